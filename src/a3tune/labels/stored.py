"""What the labels of a store were made with, and how good they are: small JSON files beside its tables.

    settings/<hash>.json             settings that a run has finished with: labels are read by one of them
    quality/<hash>-<K>.json          how well the best K of them find the true regions, where these are known

<hash> covers proposer, visual prompt, ranker and query. Light: no table is read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from a3tune.data.content import row_contents
from a3tune.errors import LabelError, in_short
from a3tune.labels.make import LabelMaker
from a3tune.labels.quality import Quality
from a3tune.machine.digests import sealed, unsealed
from a3tune.machine.files import write_atomic
from a3tune.machine.hashes import short_hash
from a3tune.types import Sample

REVISION = 2
"""Raised when the same settings come to mean other segments or similarities: everything is then made again."""
_OLD_SETTINGS = "current.json"
"""File of stores that knew one settings only."""
SETTINGS, QUALITY = "settings", "quality"
"""Folders of a store."""
_ROWS = "rows"
"""In a file of quality, what names the samples that it is about."""


@dataclass(frozen=True, slots=True)
class StoredSettings:
    """What labels of a store were made with."""

    segments: str
    """Hash of what segments depend on."""
    ranking: str
    """Hash of what similarities depend on."""
    query: str
    settings: Mapping[str, Any]
    """`LabelMaker.settings`: every number, and the content of every model."""
    given: Mapping[str, Any]
    """The settings of `config.settings.LABEL_MAKING` as they were given; empty for labels that were made in Python."""

    @property
    def name(self) -> str:
        """Hash of everything that labels depend on: the name of the settings' file in a store."""
        return short_hash([self.ranking, self.query])

    @classmethod
    def of(cls, maker: LabelMaker, given: Mapping[str, Any] | None = None) -> "StoredSettings":
        settings = maker.settings()
        return cls(
            segments=short_hash([REVISION, settings["proposer"]]),
            ranking=short_hash([REVISION, settings]),
            query=maker.query,
            settings=settings,
            given=given or {},
        )


_SETTINGS, _QUALITY = TypeAdapter(StoredSettings), TypeAdapter(Quality)


def stored_settings(folder: Path) -> list[StoredSettings]:
    """The settings that runs into a store have finished with.

    Raises:
        LabelError: a file of them is damaged.
    """
    return [_read_settings(path) for path in sorted((folder / SETTINGS).glob("*.json"))]


def made_earlier(folder: Path) -> bool:
    """Whether a version of a3tune wrote this store that knew one settings only."""
    return (folder / _OLD_SETTINGS).is_file()


def none_found(folder: Path) -> LabelError:
    """What is said of a folder without labels that can be read, and what to do."""
    if made_earlier(folder):
        return LabelError(
            f"{folder}: holds labels of an earlier version of a3tune; run `a3tune label` on it once with the settings "
            "that they were made with: nothing is made anew"
        )
    return LabelError(f"{folder}: expected finished region labels, found none; make them with `a3tune label`")


def write_settings(folder: Path, settings: StoredSettings) -> None:
    """Let labels be read by these settings: all that a run made with them is in the tables."""
    write_atomic(folder / SETTINGS / f"{settings.name}.json", json.dumps(sealed(asdict(settings)), indent=2).encode())


def write_quality(
    folder: Path, settings: str, top_k: int, samples: Sequence[Sample], quality: Mapping[str, Quality]
) -> None:
    """Keep how well the best K labels of some settings find the true regions of samples (`label_quality`)."""
    groups = {name: asdict(group) for name, group in quality.items()}
    text = json.dumps(sealed({_ROWS: _rows(samples), "quality": groups}), indent=2)
    write_atomic(_quality_file(folder, settings, top_k), text.encode())


def read_quality(folder: Path, settings: str, top_k: int, samples: Sequence[Sample]) -> dict[str, Quality] | None:
    """What `write_quality` kept of these samples; None if nothing, or of others: their regions may have changed since.

    Raises LabelError when the file is damaged.
    """
    path = _quality_file(folder, settings, top_k)
    if not path.is_file():
        return None
    try:
        kept = unsealed(json.loads(path.read_bytes()))
        if _ROWS in kept:  # earlier versions kept the groups only
            if kept[_ROWS] != _rows(samples):
                return None
            kept = kept["quality"]
        return {name: _QUALITY.validate_python(group) for name, group in kept.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LabelError(
            f"{path}: cannot be read, it is damaged ({in_short(error)}); run `a3tune label` again"
        ) from error


def _rows(samples: Sequence[Sample]) -> str:
    """Of what quality depends on, beside the labels; images are named by their content in a store."""
    return short_hash(row_contents(samples, ("prompt", "regions", "meta")))


def _quality_file(folder: Path, settings: str, top_k: int) -> Path:
    return folder / QUALITY / f"{settings}-{top_k}.json"


def _read_settings(path: Path) -> StoredSettings:
    try:
        settings = _SETTINGS.validate_python(unsealed(json.loads(path.read_bytes())))
        if path.stem != settings.name:
            raise ValueError("they are not those of the file's name")
        return settings
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LabelError(
            f"{path}: expected the settings of a label run: {in_short(error)}; delete it and label again"
        ) from error
