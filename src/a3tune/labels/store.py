"""The labels of a data set on disk: what was found, how it ranks, and which labels follow. Resumable at any moment.

A store is a folder of three tables of parquet shards. Each table lives under a hash of the settings that its rows
depend on, so that a changed setting makes again just what it must, and nothing is ever mixed:

    segments/<proposer>/             image -> its candidate segments
    embeddings/<ranking>/            image -> a vector for each segment
    similarities/<ranking>/          image, query -> a similarity for each segment
    current.json                     the settings that `LabelStore` reads by

An image is named by the hash of its content; <ranking> covers proposer, visual prompt and ranker. Top-K is no part of
the store: it is taken when labels are read.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from a3tune.data.images import content_hash, describe, load_image
from a3tune.errors import ConfigError, DataError, LabelError
from a3tune.files import replacing
from a3tune.labels import rank
from a3tune.labels.propose import Proposer
from a3tune.labels.rank import Ranker, format_query
from a3tune.labels.rle import decode, encode, region_mask
from a3tune.types import ImageSource, Labels, Rle, Sample, Segment

REVISION = 1
"""Raised when the same settings come to mean other segments or similarities: everything is then made again."""
SHARD_IMAGES = 32
"""Images between two writes: the most that a killed run loses."""
_CACHED_SHARDS = 64
_CURRENT = "current.json"

_IMAGE = pa.field("image", pa.string())
_SEGMENTS = pa.schema(
    [
        _IMAGE,
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("counts", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
    ]
)
_EMBEDDINGS = pa.schema([_IMAGE, ("width", pa.int32()), ("vectors", pa.binary())])
_SIMILARITIES = pa.schema([_IMAGE, ("query", pa.string()), ("similarity", pa.list_(pa.float32()))])


@dataclass(frozen=True, slots=True)
class LabelRun:
    """What `label_images` did."""

    images: int
    """Different images among the samples."""
    proposed: int
    """Images whose segments were made now; the rest were in the store."""
    ranked: int
    """Pairs of image and query whose similarities were made now."""
    failures: Mapping[str, str]
    """Image -> why it could not be read; its samples have no labels."""


def label_images(
    samples: Sequence[Sample],
    proposer: Proposer,
    ranker: Ranker,
    folder: Path,
    *,
    visual_prompt: str = "crop",
    query: str = "{question}",
    progress: Callable[[int, int], None] | None = None,
) -> LabelRun:
    """Propose and rank the segments of every sample's image into the store at `folder`.

    Images run through the proposer once, segments through the ranker once per visual prompt, query texts once. What the
    store holds already is not made again; an interrupted run goes on where it was, at most `SHARD_IMAGES` images are
    made twice. `progress(done, total)` is called after every image. One run at a time per store.

    Raises:
        ConfigError: no such visual prompt, or a malformed query.
        LabelError: a sample lacks a field of the query, or the store is damaged.
        DataError: the disk refuses; what was written before stays.
    """
    if visual_prompt not in rank.VISUAL_PROMPTS:
        raise ConfigError(f"visual_prompt: expected one of {', '.join(rank.VISUAL_PROMPTS)}, got {visual_prompt!r}")
    texts = [format_query(query, sample) for sample in samples]
    current = _settings(proposer, ranker, visual_prompt, query)
    maker = _Maker(folder, current, proposer, ranker)
    images, failures = _group_by_image(samples, texts)
    try:
        for done, (image, (source, queries)) in enumerate(images.items(), start=1):
            try:
                maker.make(image, source, queries)
            except DataError as error:
                failures[describe(source)] = str(error)
            if done % SHARD_IMAGES == 0:
                maker.write()
            if progress:
                progress(done, len(images))
    finally:
        maker.write()
    with replacing(folder / _CURRENT) as file:
        file.write(json.dumps(current, indent=2).encode())
    return LabelRun(len(images), maker.proposed, maker.ranked, failures)


class LabelStore:
    """Reads labels by the settings of the last finished `label_images` into this folder.

    Raises:
        LabelError: the folder holds no labels, or damaged ones.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        try:
            current = json.loads((folder / _CURRENT).read_bytes())
            self._query: str = current["query"]
            self._segments = _Table(folder / "segments" / current["segments"], _SEGMENTS, ("image",))
            self._similarities = _Table(folder / "similarities" / current["ranking"], _SIMILARITIES, ("image", "query"))
        except OSError as error:
            raise LabelError(
                f"{folder}: expected finished region labels, found none; make them with `a3tune label`"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise LabelError(
                f"{folder / _CURRENT}: expected the settings of a label run: {error}; label again"
            ) from error
        self._image_of: dict[ImageSource, str] = {}

    def labels(self, sample: Sample, top_k: int | None = 4, threshold: float | None = None) -> Labels:
        """The segments that guide the attention for a sample, best first (Eq. 3; `rank.top_k` says what K and tau do).

        Raises:
            LabelError: the sample's image or query is not in the store.
            DataError: its image cannot be read.
        """
        if sample.image not in self._image_of:
            self._image_of[sample.image] = content_hash(sample.image)
        image = self._image_of[sample.image]
        found = self._segments.get(image)
        ranked = self._similarities.get(image, format_query(self._query, sample))
        if found is None or ranked is None:
            what = "image" if found is None else "question"
            raise LabelError(
                f"sample {sample.id}: its {what} has no labels in {self._folder}; run `a3tune label` on it"
            )
        segments = _segments_of(found)
        similarity = np.asarray(ranked["similarity"])
        best = rank.top_k(similarity, top_k, threshold)
        return Labels(sample.id, tuple(segments[i] for i in best), tuple(float(similarity[i]) for i in best))


def truth_labels(sample: Sample, height: int, width: int) -> Labels | None:
    """A sample's own regions as labels, one segment each; None if nobody said where to look.

    Raises:
        LabelError: a region does not fit an image of this size.
    """
    if sample.regions is None:
        return None
    try:
        segments = tuple(Segment(encode(region_mask(region, height, width))) for region in sample.regions)
    except LabelError as error:
        raise LabelError(f"sample {sample.id}: {error}") from error
    return Labels(sample.id, segments, (1.0,) * len(segments))


class _Maker:
    """Makes what the three tables lack, image by image."""

    def __init__(self, folder: Path, current: Mapping, proposer: Proposer, ranker: Ranker):
        self._segments = _Table(folder / "segments" / current["segments"], _SEGMENTS, ("image",))
        self._embeddings = _Table(folder / "embeddings" / current["ranking"], _EMBEDDINGS, ("image",))
        self._similarities = _Table(folder / "similarities" / current["ranking"], _SIMILARITIES, ("image", "query"))
        self._proposer, self._ranker = proposer, ranker
        self._show = rank.VISUAL_PROMPTS[current["settings"]["visual_prompt"]]
        self._texts: dict[str, np.ndarray] = {}
        self.proposed = self.ranked = 0

    def make(self, image: str, source: ImageSource, queries: Sequence[str]) -> None:
        """Complete the rows of one image and its queries."""
        missing = [query for query in queries if self._similarities.get(image, query) is None]
        found, embedded = self._segments.get(image), self._embeddings.get(image)
        if found is not None and not missing:
            return
        picture = load_image(source) if found is None or embedded is None else None
        if found is None:
            assert picture is not None
            found = self._propose(image, picture)
        if embedded is None:
            assert picture is not None
            embedded = self._embed(image, picture, found)
        vectors = np.frombuffer(embedded["vectors"], np.float16).reshape(-1, embedded["width"]).astype(np.float32)
        for query, text in zip(missing, self._embed_texts(missing), strict=True):
            self._similarities.add({"image": image, "query": query, "similarity": (vectors @ text).tolist()})
        self.ranked += len(missing)

    def write(self) -> None:
        """Write what was made since the last time."""
        for table in (self._segments, self._embeddings, self._similarities):
            table.write()

    def _propose(self, image: str, picture: Image.Image) -> dict:
        segments = self._proposer(picture)
        row = {
            "image": image,
            "height": picture.height,
            "width": picture.width,
            "counts": [segment.mask.counts for segment in segments],
            "scores": [segment.score for segment in segments],
        }
        self._segments.add(row)
        self.proposed += 1
        return row

    def _embed(self, image: str, picture: Image.Image, found: dict) -> dict:
        shown = [self._show(picture, decode(segment.mask)) for segment in _segments_of(found)]
        vectors = self._ranker.embed_images(shown).astype(np.float16)
        row = {"image": image, "width": vectors.shape[1], "vectors": vectors.tobytes()}
        self._embeddings.add(row)
        return row

    def _embed_texts(self, queries: Sequence[str]) -> list[np.ndarray]:
        new = [query for query in queries if query not in self._texts]
        if new:
            self._texts.update(zip(new, self._ranker.embed_texts(new), strict=True))
        return [self._texts[query] for query in queries]


class _Table:
    """Rows in parquet shards of one folder, found by key; a row is a dict of the schema's fields."""

    def __init__(self, folder: Path, schema: pa.Schema, key: tuple[str, ...]):
        self._folder, self._schema, self._key = folder, schema, key
        self._new: dict[tuple[str, ...], dict] = {}
        self._place: dict[tuple[str, ...], tuple[Path, int]] = {}
        self._read = lru_cache(_CACHED_SHARDS)(_read_shard)
        for shard in sorted(folder.glob("*.parquet")):
            keys = _read_shard(shard, key)
            self._place |= {tuple(row.values()): (shard, number) for number, row in enumerate(keys.to_pylist())}

    def get(self, *key: str) -> dict | None:
        """The row of a key, or None."""
        if key in self._new:
            return self._new[key]
        if key not in self._place:
            return None
        shard, number = self._place[key]
        return self._read(shard).slice(number, 1).to_pylist()[0]

    def add(self, row: dict) -> None:
        """Hold a row until the next `write`."""
        self._new[tuple(row[field] for field in self._key)] = row

    def write(self) -> None:
        """Write the held rows as one shard, whole or not at all; the same keys give the same name."""
        if not self._new:
            return
        shard = self._folder / f"{_hash(sorted(self._new))}.parquet"
        with replacing(shard) as file:
            pq.write_table(pa.Table.from_pylist(list(self._new.values()), schema=self._schema), file)
        self._place |= {key: (shard, number) for number, key in enumerate(self._new)}
        self._new = {}


def _read_shard(path: Path, columns: tuple[str, ...] | None = None) -> pa.Table:
    try:
        with pq.ParquetFile(path) as shard:
            return shard.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise LabelError(
            f"{path}: expected a shard of region labels: {error}; delete this file and label again"
        ) from error


def _segments_of(row: dict) -> list[Segment]:
    size = (row["height"], row["width"])
    return [Segment(Rle(size, counts), score) for counts, score in zip(row["counts"], row["scores"], strict=True)]


def _group_by_image(
    samples: Sequence[Sample], texts: Sequence[str]
) -> tuple[dict[str, tuple[ImageSource, list[str]]], dict[str, str]]:
    """Different images with the different queries about each, and the images that cannot be read with the reason."""
    hashes: dict[ImageSource, str | None] = {}
    groups: dict[str, tuple[ImageSource, dict[str, None]]] = {}
    failures: dict[str, str] = {}
    for sample, text in zip(samples, texts, strict=True):
        if sample.image not in hashes:
            try:
                hashes[sample.image] = content_hash(sample.image)
            except DataError as error:
                hashes[sample.image] = None
                failures[describe(sample.image)] = str(error)
        image = hashes[sample.image]
        if image is not None:
            groups.setdefault(image, (sample.image, {}))[1][text] = None
    return {image: (source, list(queries)) for image, (source, queries) in groups.items()}, failures


def _settings(proposer: Proposer, ranker: Ranker, visual_prompt: str, query: str) -> dict:
    settings = {"proposer": proposer.settings(), "visual_prompt": visual_prompt, "ranker": ranker.settings()}
    return {
        "segments": _hash([REVISION, settings["proposer"]]),
        "ranking": _hash([REVISION, settings]),
        "query": query,
        "settings": settings,
    }


def _hash(value: object) -> str:
    """Short name of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
