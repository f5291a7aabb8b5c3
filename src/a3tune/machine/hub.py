"""Repositories of the Hugging Face Hub that a user names -> folders of this machine, out of its cache or downloaded.

Knows no models and no rows, and runs nothing of what it fetches.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from socket import create_connection
from threading import Thread
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from a3tune.errors import A3TuneError, in_short

SECONDS = 1.5
"""For the Hub to take a connection."""
_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>(?!.*\.\.)\w[\w./-]*))?")
_ANSWER_SECONDS = 30.0
_COMMIT = re.compile(r"[0-9a-f]{40}")

Choice = Callable[[Sequence[str]], Sequence[str]]
"""Names of all files of a repository -> patterns of those that are wanted; ValueError, with why, if none is of use."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository, perhaps at one of its branches, tags or commits."""

    name: str
    """`owner/name`."""
    revision: str | None
    kind: Literal["model", "dataset"]

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def by_hand(self) -> str:
        """The command that downloads it, on any machine."""
        kind = " --repo-type dataset" if self.kind == "dataset" else ""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.name}{kind}{revision} --local-dir DIR"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Files of a repository at one commit."""

    folder: Path
    commit: str
    whole: bool
    """Whether all that was wanted is known to be there: a cache that others filled does not always say."""


def named(text: str, kind: Literal["model", "dataset"]) -> Repository | None:
    """The repository of `owner/name` or `owner/name@revision`; None if this is, or can only be, a path."""
    match = _NAME.fullmatch(text)
    if match is None or Path(text).exists() or Path(match["name"]).parent.is_dir():
        return None
    return Repository(match["name"], match["revision"], kind)


def cached(repository: Repository, choose: Choice) -> Snapshot | None:
    """What the cache of the Hub on this machine holds, if all that is wanted is there; asks nobody."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    where: dict[str, Any] = {"repo_type": repository.kind, "revision": repository.revision}
    try:
        folder = Path(snapshot_download(repository.name, local_files_only=True, **where, allow_patterns=[]))
        try:
            names = [entry.path for entry in get_cached_repo_tree(repository.name, **where)]
        except CachedRepoTreeNotFoundError:
            there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            choose(there)
            return Snapshot(folder, folder.name, whole=False)
        patterns = list(choose(names))
        snapshot_download(repository.name, local_files_only=True, **where, allow_patterns=patterns)
        return Snapshot(folder, folder.name, whole=True)
    except (LocalEntryNotFoundError, ValueError):
        return None


def fetch(repository: Repository, choose: Choice, error: type[A3TuneError]) -> Snapshot:
    """What is wanted of a repository: out of the cache if it is known to be whole there, else downloaded into it.

    Only for names that the user gave. A bar shows the download where standard error is a terminal.

    Raises:
        error: it is not in the cache and the Hub cannot be reached in `SECONDS`, or may not be asked
            (`HF_HUB_OFFLINE`); there is no such repository or revision, a login is needed, or nothing in it is of use.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    here = cached(repository, choose)
    if here is not None and (here.whole or constants.HF_HUB_OFFLINE):
        return here
    check_reachable(str(repository), f"fetch it elsewhere (`{repository.by_hand}`) and give the folder", error)
    try:
        about: Any = HfApi().repo_info(
            repository.name, repo_type=repository.kind, revision=repository.revision, timeout=_ANSWER_SECONDS
        )
        patterns = list(_chosen(repository, choose, [item.rfilename for item in about.siblings or []], error))
        folder = snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision,
            allow_patterns=patterns,
            tqdm_class=_bar(),
        )
    except RevisionNotFoundError:
        raise error(f"{repository}: the Hugging Face Hub has no such revision of it") from None
    except RepositoryNotFoundError:
        what = "data set" if repository.kind == "dataset" else "model"
        raise error(
            f"{repository}: is no path here, and the Hugging Face Hub has no such {what}, or does not show "
            "it: check the name; where it needs consent or a login, give that on its page and run `hf auth login`"
        ) from None
    except A3TuneError:
        raise
    except Exception as failed:  # connections break in the ways of the library below
        raise error(
            f"{repository}: downloading it failed: {in_short(failed)}; what came is kept, the same command goes on. "
            f"Or fetch it by hand: {repository.by_hand}"
        ) from None
    return Snapshot(Path(folder), Path(folder).name, whole=True)


def _chosen(repository: Repository, choose: Choice, names: list[str], error: type[A3TuneError]) -> Sequence[str]:
    try:
        return choose(names)
    except ValueError as why:
        raise error(f"{repository}: {why}") from None


def pinned(text: str, kind: Literal["model", "dataset"], folder: Path) -> str:
    """A name with the commit that `folder`, its snapshot, is of; a path as it is."""
    repository = named(text, kind)
    if repository is None or not _COMMIT.fullmatch(folder.name):
        return text
    return f"{repository.name}@{folder.name}"


def check_reachable(name: str, instead: str, error: type[A3TuneError]) -> None:
    """Told within seconds, where the libraries below try for half a minute.

    Args:
        name: what is to be fetched.
        instead: what else the user can do.

    Raises:
        error: the Hub may not be asked, or takes no connection.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise error(
            f"{name}: is no folder here, nor in the cache of the Hugging Face Hub, and HF_HUB_OFFLINE is set: unset "
            f"it, or {instead}"
        )
    if not _takes_connections(constants.ENDPOINT):
        raise error(
            f"{name}: is no folder here, and the Hugging Face Hub cannot be reached ({constants.ENDPOINT}): {instead}. "
            "HF_HUB_OFFLINE=1 takes what was downloaded before"
        )


def _takes_connections(endpoint: str) -> bool:
    """Within `SECONDS`; a thread, because a name server that is silent holds up its asker for longer."""
    address = urlsplit(endpoint)
    if address.scheme in getproxies():
        return True  # the proxy knows
    answers: SimpleQueue[bool] = SimpleQueue()

    def connect() -> None:
        try:
            port = address.port or {"http": 80}.get(address.scheme, 443)
            create_connection((address.hostname or "", port), timeout=SECONDS).close()
            answers.put(True)
        except OSError:
            answers.put(False)

    Thread(target=connect, daemon=True).start()
    try:
        return answers.get(timeout=SECONDS)
    except Empty:
        return False


def _bar() -> Any:
    """The Hub's own bars, shown where standard error is a terminal, whatever else was told to be quiet."""
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": not sys.stderr.isatty(), "leave": False})

    return Bar
