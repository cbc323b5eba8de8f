"""Hub ids: download through huggingface_hub, with clear error messages."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

# The files of a model; other weight formats would double the download.
FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
# The same weights again, in the layout of their authors' own code.
COPIES = ["consolidated*.safetensors", "original/*"]


def download(repo_id: str, *, weights: bool = True) -> Path:
    """Folder of a hub model in huggingface_hub's cache; without `weights`, its configuration and tokenizer only.

    Raises:
        FileNotFoundError: no such model, or no connection and no copy in the cache.
        PermissionError: a gated model whose licence was not accepted, or a missing token.
    """
    page = f"https://huggingface.co/{repo_id}"
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
    try:
        return Path(
            snapshot_download(repo_id, allow_patterns=FILES, ignore_patterns=COPIES if weights else ["*.safetensors"])
        )
    except GatedRepoError:
        raise PermissionError(f"{repo_id} is gated: accept its licence at {page}, then {login}") from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"the hub has no model {repo_id!r}, or it is private: check {page}, then {login}"
        ) from None
    except HFValidationError as error:
        raise FileNotFoundError(f"no folder or file {repo_id!r}, and it cannot be a hub id: {error}") from None
    except LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"no folder or file {repo_id!r}, and the hub cannot be reached: check the path or the connection, "
            "or give a local folder or GGUF file"
        ) from None
    except (HTTPError, OSError) as error:  # The HTTP client raises HTTPError if a proxy refuses.
        raise FileNotFoundError(f"{repo_id} could not be downloaded from the hub: {error}") from None
