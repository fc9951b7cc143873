"""A directory onto the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from verl_speculator.errors import UserError


def check_repo(repo: str) -> None:
    """Refuse what can be no repository, before anything is read.

    Raises:
        UserError: naming the repository.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo}: {' '.join(str(error).split())}") from None
    if "/" not in repo:
        raise UserError(f"--push-to-hub {repo}: expected owner/name")


def push(directory: Path, repo: str, *, private: bool) -> str:
    """Upload a directory as one commit, making the repository if there is none.

    Returns:
        The address of the commit.

    Raises:
        UserError: if the hub refuses: no token, no right, no connection.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=directory, commit_message="Upload a speculator"))
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.TransportError, OSError) as error:
        told = " ".join(str(error).split())[:300]
        raise UserError(f"--push-to-hub {repo}: {told}; what was exported is in {directory}") from None
