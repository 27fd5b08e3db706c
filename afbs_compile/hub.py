"""Files on the Hugging Face Hub, by its own library: cache, token, endpoint and offline mode are its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afbs_compile.errors import RecipeError

EXTRA = "the Hub needs huggingface_hub: pip install huggingface_hub"


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise RecipeError(EXTRA) from error
    return huggingface_hub


def downloaded(repo_id: str, filename: str, **options: Any) -> str:
    """Path of a file of a repository in the Hub's cache.

    Args:
        repo_id: ``"owner/name"``; filename: in it.
        options: of ``huggingface_hub.hf_hub_download``: ``revision``, ``token``, ``cache_dir``, ...

    Raises:
        RecipeError: it cannot be had; one sentence.
    """
    hub = _library()
    try:
        return str(hub.hf_hub_download(repo_id, filename, **options))
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"{filename} of {repo_id} cannot be had from the Hub: {reason}") from error


def uploaded(
    repo_id: str, files: Mapping[str, str], once: Mapping[str, str], *, message: str, private: bool | None, token: Any
) -> str:
    """Put text files into a repository, which is made where it is missing; the address of the commit.

    Args:
        repo_id: ``"owner/name"``; files: text by name.
        once: likewise, but files that the repository has already stay as they are.
        message: of the commit; private: whether a new repository is; token: of the Hub, by default the one logged in.
    """
    hub = _library()
    api = hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    wanted = dict(files) | {name: text for name, text in once.items() if not api.file_exists(repo_id, name)}
    operations = [
        hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=text.encode()) for name, text in wanted.items()
    ]
    return str(api.create_commit(repo_id, operations, commit_message=message).commit_url)
