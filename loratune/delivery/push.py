"""Uploading an exported folder to the Hugging Face Hub."""

from pathlib import Path
from typing import cast

from loratune.errors import StorageError


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder that `export` wrote, its model card as README.md included, as one commit. Returns the repository's address.

    repository: `user/name` or `organisation/name`, created unless it is there; private: of a new one.
    The token is that of `hf auth login` or of the environment variable HF_TOKEN; HF_ENDPOINT names another hub.
    Raises StorageError: no token, no right to write, no connection, a name that the hub does not take.
    """
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import validate_repo_id

    api = HfApi()
    unreachable = cast(tuple[type[Exception], ...], errors.HfHubHTTPError.__bases__)  # OSError, and its HTTP client's own error
    try:
        validate_repo_id(repository)
        where = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=where.repo_id, folder_path=folder, commit_message="Adapter and model card by loratune")
    except errors.HFValidationError as error:
        raise StorageError(f"--push {repository}: {error}. Needed: user/name, as on the hub.") from error
    except errors.LocalTokenNotFoundError as error:
        raise StorageError(f"cannot push to {repository}: no token. Run `hf auth login`, or set HF_TOKEN to one that may write.") from error
    except errors.OfflineModeIsEnabled as error:
        raise StorageError(f"cannot push to {repository}: HF_HUB_OFFLINE is set. Unset it.") from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        remedy = " The token may not write there: `hf auth whoami` tells whose it is." if code in (401, 403) else ""
        raise StorageError(f"cannot push to {repository}: {error.server_message or error}.{remedy}") from error
    except unreachable as error:
        raise StorageError(f"cannot push to {repository}: {api.endpoint} cannot be reached ({error}).") from error
    return f"{api.endpoint}/{where.repo_id}"
