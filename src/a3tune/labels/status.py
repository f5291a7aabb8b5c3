"""What a label store holds, in numbers and in words. Knows files, makes nothing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from a3tune.errors import LabelError
from a3tune.labels.store import CURRENT, TABLES
from a3tune.labels.table import read_shard


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """Counts are those of the settings that the store is read by; of all its settings if no run has finished yet."""

    finished: bool
    """Whether a run came to its end: only then can labels be read."""
    images: int
    """Images with segments, those without any included."""
    segments: int
    rankings: int
    """Pairs of image and query."""
    settings: Mapping[str, str]
    """Setting -> its value in words; empty if no run has finished."""
    shards: int
    """Files of all settings, old ones too."""
    bytes: int
    """Their size."""
    damaged: tuple[Path, ...]
    """Those that cannot be read, left out of the counts; what they held is made again once they are deleted."""


def store_status(folder: Path) -> StoreStatus:
    """Look through a label store; every shard is read.

    Raises:
        LabelError: the folder is no label store.
    """
    shards = sorted(path for name in TABLES for path in (folder / name).rglob("*.parquet"))
    current = _current(folder / CURRENT)
    if current is None and not shards:
        raise LabelError(f"{folder}: expected region labels, found none; make them with `a3tune label`")
    images = segments = rankings = 0
    damaged: list[Path] = []
    for shard in shards:
        name = shard.relative_to(folder).parts[0]
        try:
            rows = read_shard(shard)
        except LabelError:
            damaged.append(shard)
            continue
        if current is not None and shard.parent.name != current[TABLES[name][2]]:
            continue
        if name == "segments":
            images += rows.num_rows
            segments += sum(map(len, rows["counts"].to_pylist()))
        elif name == "similarities":
            rankings += rows.num_rows
    return StoreStatus(
        finished=current is not None,
        images=images,
        segments=segments,
        rankings=rankings,
        settings={} if current is None else _words({**current["settings"], "query": current["query"]}),
        shards=len(shards),
        bytes=sum(shard.stat().st_size for shard in shards),
        damaged=tuple(damaged),
    )


def _current(path: Path) -> dict | None:
    """The settings of the last finished run, if there is one."""
    try:
        current = json.loads(path.read_bytes())
        names = {settings for _, _, settings in TABLES.values()} | {"settings", "query"}
        if not isinstance(current, dict) or not names <= current.keys():
            raise ValueError("other keys")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LabelError(f"{path}: expected the settings of a label run: {error}; label again") from error
    return current


def _words(settings: Mapping[str, object]) -> dict[str, str]:
    """`{"proposer": {"name": "sam", "min_iou": 0.5}}` -> `{"proposer": "sam (min_iou 0.5)"}`."""
    words: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            others = ", ".join(f"{name} {_short(item)}" for name, item in value.items() if name != "name")
            words[key] = f"{value.get('name', '')} ({others})" if others else str(value.get("name", ""))
        else:
            words[key] = str(value)
    return words


def _short(value: object) -> str:
    """Hashes of contents are cut: nobody reads 64 digits."""
    return value[:12] if isinstance(value, str) else str(value)
