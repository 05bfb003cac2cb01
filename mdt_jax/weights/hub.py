"""The Hugging Face hub: a file fetched into its cache, a folder sent to a repository.

HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are honoured.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mdt_jax.basics.atomic import is_full_disk
from mdt_jax.basics.names import printable
from mdt_jax.weights.errors import NoSuchFile, WeightsError

# A file of a repository, of its newest revision or of one that is named. Names of revisions with
# slashes are the hub's own.
_HUB_FILE = re.compile(
    r"hf://([^/@]+)/([^/@]+)(?:@(refs/pr/\d+|refs/convert/[^/]+|[^/]+))?/(?!/)(.+)"
)


def fetch(source: str, whole: str = "") -> Path:
    """The local path, in the hub's cache, of `hf://OWNER/REPO[@REVISION]/FILE`.

    Args:
      source: the address.
      whole: the address of the repository, where the file is wanted as a part of all of it.

    Raises:
      WeightsError: no such file, or a hub that cannot be reached; says which file to fetch by hand.
    """
    import huggingface_hub
    from huggingface_hub import errors

    found = _HUB_FILE.fullmatch(source)
    if not found:
        raise WeightsError(
            f"{source} is not of the form hf://OWNER/REPO/FILE, or hf://OWNER/REPO for all of one"
        )
    owner, repo, revision, file = found.groups()
    try:
        with _quiet_retries():
            return Path(huggingface_hub.hf_hub_download(f"{owner}/{repo}", file, revision=revision))
    except errors.EntryNotFoundError as error:
        # A missing local copy of a file is one of these too, when the hub is out of reach.
        if not isinstance(error, errors.LocalEntryNotFoundError):
            raise NoSuchFile(f"{source}: {owner}/{repo} holds no file {file}") from error
        cause = "is not in the local cache and the hub cannot be reached"
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{source}: the hub has no {owner}/{repo}, or HF_TOKEN gives no access to it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(
            f"{source}: {owner}/{repo} has no revision {revision}; give a branch, a tag or a commit"
        ) from error
    except Exception as error:  # without a network, one of the HTTP library's many errors
        if is_full_disk(error):
            raise WeightsError(
                f"{source} finds no room in the cache ({error}); make room, or let HF_HOME name a "
                "folder on another disk"
            ) from error
        cause = f"cannot be fetched ({type(error).__name__})"
    if whole:
        raise WeightsError(
            f"{whole}: its {file} {cause}; where there is a network, run hf download "
            f"{owner}/{repo} --local-dir FOLDER, copy the folder here, and give its path in place "
            f"of {whole}"
        )
    raise WeightsError(
        f"{source} {cause}: where there is a network, download the file {file} of the Hugging Face "
        f"repository {owner}/{repo}, copy it here, and give its path in place of {source}"
    )


def check_repository(repo: str) -> str:
    """OWNER/REPO, if that is the form of a repository's name.

    Raises:
      WeightsError: another form; says the right one.
    """
    name = repo.removeprefix("hf://")
    parts = name.split("/")
    good = len(name) <= 96 and all(re.fullmatch(r"[\w.-]+", part, re.ASCII) for part in parts)
    if len(parts) != 2 or not good or name.endswith(".git") or re.search(r"--|\.\.", name):
        raise WeightsError(
            f"--repo {printable(repo)} is no name of a repository; give OWNER/REPO, of letters, "
            "digits, -, _ and ."
        )
    return name


def check_sending(repo: str) -> None:
    """Refuses, with WeightsError, what cannot be sent, before there is anything to send.

    Args:
      repo: OWNER/REPO.
    """
    import huggingface_hub

    repo = check_repository(repo)
    if not huggingface_hub.get_token():
        raise WeightsError(
            f"--repo {repo}: there is no token for the hub; run hf auth login or set HF_TOKEN, or "
            "write the folder with --output DIR, which needs none"
        )


def send(
    folder: Path,
    repo: str,
    *,
    is_ours: Callable[[str], bool],
    message: str,
    files: Sequence[str],
    private: bool = False,
) -> str:
    """Sends a folder to a repository of the hub, as one commit, and returns its address.

    The repository is made if it is not there. What it holds besides stays, and so does its history.

    Args:
      folder: the files' folder.
      repo: OWNER/REPO.
      is_ours: tells from OWNER/REPO whether a repository that holds files is one to write over.
      message: of the commit.
      files: names of the files to send; one that only the repository has is removed there.
      private: whether a new repository is for its owner alone.

    Raises:
      WeightsError: no token, no network, a repository of something else, or what the hub answers.
    """
    import huggingface_hub
    from huggingface_hub import errors

    check_sending(repo)
    repo = check_repository(repo)
    api = huggingface_hub.HfApi()
    with _quiet_retries(), _explained(repo):
        try:
            there = api.repo_info(repo)
        except errors.RepositoryNotFoundError:
            there = None
        if there is not None:
            _check_there(repo, there, private, is_ours)
        api.create_repo(repo, private=private, exist_ok=True)
        sent = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message,
            allow_patterns=list(files),
            delete_patterns=list(files),
        )
    return str(getattr(sent, "commit_url", "") or f"{api.endpoint}/{repo}")


def _check_there(repo: str, there: Any, private: bool, is_ours: Callable[[str], bool]) -> None:
    """Refuses to write over something else, and to call private what is public."""
    if private and not there.private:
        raise WeightsError(
            f"--private: {repo} is there, and public; make it private on the hub, or give another "
            "--repo"
        )
    files = [entry.rfilename for entry in there.siblings or ()]
    files = [name for name in files if name not in (".gitattributes", "README.md", "LICENSE")]
    if files and not is_ours(repo):
        raise WeightsError(
            f"--repo {repo} holds something else ({', '.join(map(printable, files[:3]))}"
            f"{', …' if len(files) > 3 else ''}); give another name"
        )


@contextlib.contextmanager
def _quiet_retries() -> Iterator[None]:
    """The hub's library logs every retry; here the line of the error says it once."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


_ANSWERS = {
    401: "does not take the token; run hf auth login again, or set HF_TOKEN",
    403: "lets this token not write there; give one with the right to write, or another OWNER",
    409: "has another commit under way there; try again",
    413: "takes no files of this size",
    429: "takes no more requests for now; try again later",
}


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turns what can go wrong while a folder is sent into a WeightsError of one line."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # the HTTP library's own, and the hub's
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = printable(" ".join(str(error).split()))[:200]
        if status in _ANSWERS:
            reason = f"the hub {_ANSWERS[status]}"
        elif status is not None:
            reason = f"the hub answers {status}: {said}"
        elif isinstance(error, ValueError):  # the card's head, a name
            reason = f"the hub does not take the folder: {said}"
        else:
            reason = f"the hub cannot be reached ({type(error).__name__})"
        raise WeightsError(
            f"--repo {repo}: {reason}; --output DIR writes the folder without the hub"
        ) from error
