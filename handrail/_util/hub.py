"""Look up a name on the Hugging Face hub once, before the libraries request its files one by one."""

from __future__ import annotations

import logging
from typing import Literal

from handrail._util.errors import UserError

log = logging.getLogger("handrail")

HUB_SECONDS = 10.0
"""Seconds to wait for the Hugging Face hub."""


def look_up(name: str, kind: Literal["model", "dataset"], field: str) -> None:
    """Check that the hub knows ``name``, which is not a local path.

    If the hub cannot be reached, the whole process goes offline, with a warning: cached files still load and
    anything else fails at once, whereas transformers and datasets would wait half a minute for each of a
    dozen files.
    Raises UserError, naming ``field``, if the hub has nothing of that name.
    """
    from huggingface_hub import HfApi, constants

    # HTTPError is that of httpx or of httpx2, whichever the client uses.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UserError(
            f"{field}: there is no file or directory {name}, and the Hugging Face hub shows no {kind} of "
            "that name; check the spelling (a private or gated one needs 'hf auth login')"
        ) from error
    except HfHubHTTPError:
        pass  # a temporary failure of the hub: the libraries retry
    except OfflineModeIsEnabled:
        pass  # the user has turned it on
    except (HTTPError, OSError) as error:  # no network, or a timeout
        constants.HF_HUB_OFFLINE = True
        log.warning(
            "the Hugging Face hub cannot be reached (%s: %s), so only what is cached is used",
            type(error).__name__,
            error,
        )
