"""Look up a name on the Hugging Face hub once, before the libraries request its files one by one."""

from __future__ import annotations

from typing import Literal

from handrail._util.errors import UserError


def look_up(name: str, kind: Literal["model", "dataset"], field: str) -> None:
    """Check that the hub knows ``name``, which is not a local path.

    If the hub cannot be reached, the whole process goes offline: cached files still load and anything else
    fails at once, whereas transformers and datasets would wait half a minute for each of a dozen files.
    Raises UserError, naming ``field``, if the hub has nothing of that name.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=10)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UserError(
            f"{field}: there is no file or directory {name}, and the Hugging Face hub shows no {kind} of "
            "that name; check the spelling (a private or gated one needs 'hf auth login')"
        ) from error
    except HfHubHTTPError:
        pass  # a temporary failure of the hub: the libraries retry
    except Exception:  # no network, a timeout, or HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = True
