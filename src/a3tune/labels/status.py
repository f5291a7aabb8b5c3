"""What a label store holds, in numbers and in words. Knows files, makes nothing."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from a3tune.errors import LabelError
from a3tune.labels.quality import Quality
from a3tune.labels.rows import TABLES
from a3tune.labels.stored import QUALITY, StoredSettings, made_earlier, none_found, stored_settings
from a3tune.labels.table import read_shard


@dataclass(frozen=True, slots=True)
class SettingsStatus:
    """What a store holds of the labels that were made with one set of settings."""

    settings: Mapping[str, str]
    """Setting -> its value in words."""
    images: int
    """Images with segments, those without any included."""
    segments: int
    rankings: int
    """Pairs of image and query."""
    quality: Mapping[int, Quality]
    """By K, how well the best K labels find the true regions, beside what all segments would: where these are known."""


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """What is in a store."""

    finished: tuple[SettingsStatus, ...]
    """One for each set of settings that a run has finished with: only then can labels be read."""
    shards: int
    """Files of all settings, unfinished ones too."""
    bytes: int
    """Their size."""
    damaged: tuple[Path, ...]
    """Those that cannot be read, left out of the counts; what they held is made again once they are deleted."""


def store_status(folder: Path) -> StoreStatus:
    """Look through a label store; every shard is read.

    Raises:
        LabelError: the folder is no label store.
    """
    shards = sorted((path, name) for name in TABLES for path in (folder / name).rglob("*.parquet"))
    stored = stored_settings(folder)
    if not stored and (not shards or made_earlier(folder)):
        raise none_found(folder)
    counts: dict[Path, Counter[str]] = {}
    damaged: list[Path] = []
    for shard, name in shards:
        try:
            counts.setdefault(shard.parent, Counter()).update(_counts(shard, name))
        except LabelError:
            damaged.append(shard)
    return StoreStatus(
        finished=tuple(_settings_status(folder, settings, counts) for settings in stored),
        shards=len(shards),
        bytes=sum(shard.stat().st_size for shard, _ in shards),
        damaged=tuple(damaged),
    )


def _counts(shard: Path, name: str) -> dict[str, int]:
    """Rows, and segments where they hold any; the shard itself is not kept: a store can be larger than the memory."""
    table = read_shard(shard, TABLES[name][0])
    segments = sum(map(len, table["counts"].to_pylist())) if name == "segments" else 0
    return {"rows": table.num_rows, "segments": segments}


def _settings_status(folder: Path, stored: StoredSettings, counts: Mapping[Path, Counter[str]]) -> SettingsStatus:
    """`counts`: by the folder of a table of some settings."""
    segments = counts.get(folder / "segments" / stored.segments, Counter())
    rankings = counts.get(folder / "similarities" / stored.ranking, Counter())
    return SettingsStatus(
        settings=_words({**stored.settings, "query": stored.query}),
        images=segments["rows"],
        segments=segments["segments"],
        rankings=rankings["rows"],
        quality=_quality(folder, stored.name),
    )


def _quality(folder: Path, settings: str) -> dict[int, Quality]:
    """Of all samples, as the last run with these settings measured it."""
    found: dict[int, Quality] = {}
    for path in sorted((folder / QUALITY).glob(f"{settings}-*.json")):
        try:
            kept = json.loads(path.read_bytes())
            groups = kept.get("quality", kept)
            if "all" in groups:
                found[int(path.stem.rpartition("-")[2])] = Quality(**groups["all"])
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise LabelError(f"{path}: cannot be read, it is damaged ({error}); run `a3tune label` again") from error
    return found


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
