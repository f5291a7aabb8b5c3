"""Data sets that are named on the Hugging Face Hub -> folders of tables and images. Runs no script of theirs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from a3tune.data.importing.sources import PICTURES, TABLES
from a3tune.data.paths import PACKED
from a3tune.errors import DataError
from a3tune.machine import hub

_READ = (*TABLES, *PICTURES, ".dcm.gz", ".hdr", ".img", ".arrow")


@dataclass(frozen=True, slots=True)
class Source:
    """Where the tables of a source are on this machine."""

    path: Path
    commit: str = ""
    """Of a data set of the Hub."""
    notes: tuple[str, ...] = ()


def find_source(source: Path) -> Source:
    """A path as it is, whether or not it is there; `owner/name` and `owner/name@revision` as the folder of a snapshot.

    A data set of the Hub is taken from its cache, else downloaded: its tables and images, nothing else.

    Raises:
        DataError: it cannot be downloaded, or has no tables.
    """
    repository = hub.named(str(source), "dataset")
    if repository is None or source.name.lower().endswith((*TABLES, *PICTURES)):
        return Source(source)
    packed: list[str] = []

    def wanted(files: Sequence[str]) -> list[str]:
        endings = {name[-len(end) :] for name in files for end in _READ if name.lower().endswith(end)}
        packed[:] = [name for name in files if name.lower().endswith(PACKED) and not name.lower().endswith(_READ)]
        if not any(_is_table(name) for name in files):
            has = Counter(PurePosixPath(name).suffix or name for name in files).most_common(6)
            raise ValueError(
                f"expected tables in it ({', '.join(TABLES)}), it has {', '.join(name for name, _ in has)}; no script "
                f"is run: {repository.name}@refs/convert/parquet is what the Hub made of it, if it did"
            )
        return [f"*{ending}" for ending in sorted(endings)]

    found = hub.fetch(repository, wanted, DataError)
    notes = [f"{repository.name} of the Hugging Face Hub at {found.commit}; its files stay in {found.folder}"]
    if not found.whole:
        notes.append("the cache does not say whether that is all of it: without HF_HUB_OFFLINE the Hub is asked")
    if packed:
        notes.append(f"not fetched: {', '.join(packed)[:150]}; unpack them into a folder and give it with --images")
    return Source(found.folder, found.commit, tuple(notes))


def _is_table(name: str) -> bool:
    return name.lower().endswith((*TABLES, ".arrow")) and not name.startswith((".", "_"))
