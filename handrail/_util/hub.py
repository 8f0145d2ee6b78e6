"""The Hugging Face hub, asked once for a name before any library asks for its files one by one."""

from __future__ import annotations

from typing import Literal

from handrail._util.errors import UserError


def look_up(name: str, kind: Literal["model", "dataset"], field: str) -> None:
    """Ask the hub for ``name``, which is no file or directory. Raises UserError, naming ``field``, if the hub has nothing of that name.

    A hub that cannot be reached is not asked again in this process: what it gave before is still read from the cache, and
    anything else fails at once. transformers and datasets would wait half a minute for each of a dozen files.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=10)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UserError(
            f"{field}: there is no file or directory {name}, and the Hugging Face hub shows no {kind} of that name; "
            "check the spelling (a private or gated one needs 'hf auth login')"
        ) from error
    except HfHubHTTPError:
        pass  # it answers, though not now: the libraries try again
    except Exception:  # no network, no answer in time, or HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = True
