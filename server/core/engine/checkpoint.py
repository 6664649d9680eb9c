"""Finds a checkpoint: bundled, local, in the Hugging Face cache, or on the hub."""

import contextlib
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_session, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from server.reasons import first_line

DEFAULT_MODEL = "Qwen/Qwen1.5-0.5B-Chat"
# A commit, so that the default does not change by itself, and needs no hub once it is in the cache.
DEFAULT_REVISION = "4d14e384a4b037942bb3f3016665157c8bcb70ea"
BUNDLED_MODEL = "qwen-mini"
BUNDLED_FOLDER = Path(__file__).parents[2] / "models" / BUNDLED_MODEL
# No pickles: only formats that cannot run code.
FILES = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "tasks.toml", "*examples.jsonl")
WEIGHTS = "*.safetensors"
GGUF_MAGIC = b"GGUF"
# A download is complete if the cache has these.
ESSENTIAL_FILES, ESSENTIAL_WEIGHTS = ("config.json", "tokenizer.json"), "model.safetensors"
# To connect, and between two parts of a response: a firewall may drop packets silently.
HUB_TIMEOUT_S = 10


class CheckpointError(Exception):
    """The checkpoint cannot be used; the message is one sentence for the console."""


class HubUnreachableError(CheckpointError):
    """The hub does not answer, and the checkpoint is not in the cache."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's id for clients, its place, and a warning for the user.

    path: a folder, or a GGUF.
    """

    model_id: str
    path: Path
    warning: str | None = None


def find_checkpoint(
    model: str, revision: str | None = None, *, has_weights: bool = True
) -> Checkpoint:
    """Resolves `auto`, `mini`, a local folder, a GGUF or a hub id; only `auto` has a fallback.

    revision: commit, branch or tag on the hub. None: `DEFAULT_REVISION` for `auto`, else the
    newest.
    has_weights: whether to download the weights, too.

    Raises:
        CheckpointError: there is no such model, or it cannot be fetched.
    """
    if model == "auto":
        return _find_default(revision or DEFAULT_REVISION, has_weights)
    if (local := _find_local(model)) is None:
        return Checkpoint(model, _download(model, revision, has_weights))
    if revision is not None:
        raise CheckpointError(f"--revision is for models of the hub; {model} is on this machine")
    return local


def _find_local(model: str) -> Checkpoint | None:
    path = Path(model).expanduser()
    if model == "mini":
        return Checkpoint(BUNDLED_MODEL, BUNDLED_FOLDER)
    if path.is_dir():
        return Checkpoint(path.resolve().name, path)
    if not path.is_file():
        if path.suffix == ".gguf":
            raise CheckpointError(f"there is no file {model}")
        return None
    if not _is_gguf(path):
        raise CheckpointError(f"{model} is a file; give the folder of a checkpoint, or a GGUF")
    return Checkpoint(path.stem, path)


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _find_default(revision: str, has_weights: bool) -> Checkpoint:
    with contextlib.suppress(HubUnreachableError):
        folder = _download(DEFAULT_MODEL, revision, has_weights)
        # If the hub cannot be reached, this is what is cached, complete or not.
        if _is_complete(folder, has_weights):
            return Checkpoint(DEFAULT_MODEL, folder)
    return Checkpoint(
        f"{BUNDLED_MODEL}-fallback",
        BUNDLED_FOLDER,
        f"{DEFAULT_MODEL} is neither in the cache nor can the Hugging Face hub be reached: "
        f"serving the small bundled {BUNDLED_MODEL} instead; its answers are much simpler",
    )


def _download(repo_id: str, revision: str | None, has_weights: bool) -> Path:
    """Completes the repository in the cache, with a progress bar. Returns its folder."""
    hooks = get_session().event_hooks["request"]
    if _limit_time not in hooks:
        hooks.append(_limit_time)
    try:
        return _fetch(repo_id, revision, has_weights)
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo_id!r} is neither a folder here nor a model id of the Hugging Face hub"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the Hugging Face hub has no public model {repo_id!r}, nor is it a folder here; "
            "check the spelling (a private model needs HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo_id!r} has no revision {revision!r} on the Hugging Face hub; give a commit, "
            "branch or tag with --revision"
        ) from error
    except (LocalEntryNotFoundError, httpx2.TransportError) as error:
        raise HubUnreachableError(
            f"the Hugging Face hub cannot be reached and {repo_id!r} is neither a folder here nor "
            "complete in the cache; connect once to download it, set HF_ENDPOINT to a mirror, or "
            "use --model mini"
        ) from error
    except (HfHubHTTPError, EntryNotFoundError) as error:
        raise CheckpointError(
            f"cannot download {repo_id!r} from the hub: {first_line(error)}"
        ) from error
    except ValueError as error:
        # Not JSON: the login page of a network, or a proxy's notice.
        raise HubUnreachableError(
            f"the response does not come from the Hugging Face hub ({first_line(error)}), and "
            f"{repo_id!r} is neither a folder here nor complete in the cache; check the network, "
            "or use --model mini"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot store {repo_id!r} in the cache: {first_line(error)}"
        ) from error


def _fetch(repo_id: str, revision: str | None, has_weights: bool) -> Path:
    patterns = [*FILES, WEIGHTS] if has_weights else [*FILES]
    fetch = partial(snapshot_download, repo_id, revision=revision, allow_patterns=patterns)
    if revision is None or not re.fullmatch("[0-9a-f]{40}", revision):
        return Path(fetch())
    # A commit never changes, so a complete one needs no request.
    with contextlib.suppress(LocalEntryNotFoundError):
        if _is_complete(folder := Path(fetch(local_files_only=True)), has_weights):
            return folder
    try:
        # Fails at once if the hub cannot be reached; huggingface_hub tries six times, for 25 s, to
        # list the files of a commit.
        HfApi().model_info(repo_id, revision=revision)
    except httpx2.TransportError:
        return Path(fetch(local_files_only=True))
    return Path(fetch())


def _is_complete(folder: Path, has_weights: bool) -> bool:
    essential = (*ESSENTIAL_FILES, *([ESSENTIAL_WEIGHTS] if has_weights else []))
    return all((folder / name).is_file() for name in essential)


def _limit_time(request: httpx2.Request) -> None:
    # huggingface_hub sends requests without a timeout, whatever its client's is.
    request.extensions["timeout"] = httpx2.Timeout(HUB_TIMEOUT_S).as_dict()
