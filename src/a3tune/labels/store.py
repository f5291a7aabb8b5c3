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

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from a3tune.data.images import content_hash, describe, load_image
from a3tune.errors import ConfigError, DataError, LabelError
from a3tune.files import locked, replacing
from a3tune.labels import cluster, rank
from a3tune.labels import workers as processes
from a3tune.labels.propose import Proposer
from a3tune.labels.rank import VISUAL_PROMPTS, Ranker, format_query
from a3tune.labels.rle import decode, encode, region_mask
from a3tune.labels.table import Table, short_hash
from a3tune.types import ImageSource, Labels, Rle, Sample, Segment

REVISION = 2
"""Raised when the same settings come to mean other segments or similarities: everything is then made again."""
SHARD_IMAGES = 32
"""Images between two writes: the most that a killed run loses."""
_CACHED_TEXTS = 2**14
"""Vectors of queries that a worker keeps: templates ask the same of many images."""
BACKENDS = {"process": processes.in_order, "ray": cluster.in_order}
"""Where the workers are: processes of this machine, or actors of a Ray cluster."""
CURRENT = "current.json"

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
TABLES = {
    "segments": (_SEGMENTS, ("image",), "segments"),
    "embeddings": (_EMBEDDINGS, ("image",), "ranking"),
    "similarities": (_SIMILARITIES, ("image", "query"), "ranking"),
}
"""Folder of a table -> columns, key, and the name in `current.json` of the settings that its rows depend on."""


def open_table(folder: Path, name: str, current: Mapping) -> Table:
    """One of a store's tables for settings as `current.json` holds them.

    Raises:
        LabelError: a shard is damaged.
    """
    schema, key, settings = TABLES[name]
    return Table(folder / name / current[settings], schema, key)


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
    workers: int = 1,
    backend: Literal["process", "ray"] = "process",
    progress: Callable[[int, int], None] | None = None,
) -> LabelRun:
    """Propose and rank the segments of every sample's image into the store at `folder`.

    Images run through the proposer once, segments through the ranker once per visual prompt, query texts once. What the
    store holds already is not made again; an interrupted run goes on where it was, at most `SHARD_IMAGES` images are
    made twice. With several `workers`, or with those of a Ray cluster, images are shared out to processes of one thread
    each, which read images and load the models by their paths; only this process writes, and the store is the same.
    `progress(done, total)` is called after every image.

    Raises:
        ConfigError: no such visual prompt, a malformed query, less than one worker, or no Ray.
        LabelError: a sample lacks a field of the query, the store is damaged, or a worker died.
        OutputError: the disk refuses; what was written before stays.
        RunError: another run writes to this store.
    """
    if visual_prompt not in VISUAL_PROMPTS:
        raise ConfigError(f"visual_prompt: expected one of {', '.join(VISUAL_PROMPTS)}, got {visual_prompt!r}")
    if workers < 1:
        raise ConfigError(f"workers: expected an integer >= 1, got {workers}")
    texts = [format_query(query, sample) for sample in samples]
    current = _settings(proposer, ranker, visual_prompt, query)
    images, failures = _group_by_image(samples, texts)
    with locked(folder):
        _sweep(folder)
        maker = _Maker(folder, current)
        tasks = (maker.task(image, source, queries) for image, (source, queries) in images.items())
        looks = BACKENDS[backend](_Look(proposer, ranker, visual_prompt), tasks, workers)
        try:
            for done, (image, (source, _)) in enumerate(images.items(), start=1):
                seen = next(looks)
                if isinstance(seen, str):
                    failures[describe(source)] = seen
                elif seen is not None:
                    maker.complete(image, seen)
                if done % SHARD_IMAGES == 0:
                    maker.write()
                if progress:
                    progress(done, len(images))
        finally:
            looks.close()
            maker.write()
        with replacing(folder / CURRENT) as file:
            file.write(json.dumps(current, indent=2).encode())
    return LabelRun(len(images), maker.proposed, maker.ranked, failures)


class StoredImage(NamedTuple):
    """An image as the store knows it."""

    hash: str
    """SHA-256 of its encoded bytes; tells nothing of the patient."""
    height: int
    width: int


class LabelStore:
    """Reads labels by the settings of the last finished `label_images` into this folder.

    Raises:
        LabelError: the folder holds no labels, or damaged ones.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        try:
            current = json.loads((folder / CURRENT).read_bytes())
            self._query: str = current["query"]
            self._segments = open_table(folder, "segments", current)
            self._similarities = open_table(folder, "similarities", current)
        except OSError as error:
            raise LabelError(
                f"{folder}: expected finished region labels, found none; make them with `a3tune label`"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise LabelError(
                f"{folder / CURRENT}: expected the settings of a label run: {error}; label again"
            ) from error
        self._image_of: dict[ImageSource, str] = {}

    def labels(self, sample: Sample, top_k: int | None = 4, threshold: float | None = None) -> Labels:
        """The segments that guide the attention for a sample, best first (Eq. 3; `rank.top_k` says what K and tau do).

        Raises:
            LabelError: the sample's image or query is not in the store.
            DataError: its image cannot be read.
        """
        found = self._found(sample)
        ranked = self._similarities.get(found["image"], format_query(self._query, sample))
        if ranked is None:
            raise self._lacks(sample, "question")
        segments = _segments_of(found)
        similarity = np.asarray(ranked["similarity"])
        best = rank.top_k(similarity, top_k, threshold)
        return Labels(sample.id, tuple(segments[i] for i in best), tuple(float(similarity[i]) for i in best))

    def image(self, sample: Sample) -> StoredImage:
        """Name and size of a sample's image.

        Raises:
            LabelError: the image is not in the store.
            DataError: it cannot be read.
        """
        found = self._found(sample)
        return StoredImage(found["image"], found["height"], found["width"])

    def _found(self, sample: Sample) -> dict:
        if sample.image not in self._image_of:
            self._image_of[sample.image] = content_hash(sample.image)
        found = self._segments.get(self._image_of[sample.image])
        if found is None:
            raise self._lacks(sample, "image")
        return found

    def _lacks(self, sample: Sample, what: str) -> LabelError:
        return LabelError(f"sample {sample.id}: its {what} has no labels in {self._folder}; run `a3tune label` on it")


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


class _Task(NamedTuple):
    """What is to be seen in one image."""

    source: ImageSource
    found: dict | None
    """Its row of segments, if the store has it."""
    embedded: bool
    """Whether the store has the vectors of these segments: only the queries are new."""
    queries: tuple[str, ...]


class _Seen(NamedTuple):
    found: dict | None
    """What a row of segments holds, but for the image's name; None if the store has segments and vectors."""
    vectors: np.ndarray | None
    """float16 [M, E]: the embedded segments, likewise."""
    texts: Mapping[str, np.ndarray]
    """Query -> float32 [E]."""


class _Look:
    """The costly part of an image's labels; returns why an image cannot be read.

    Texts are embedded one by one: in a batch the last bits of a vector depend on the other texts, and the store would
    depend on where a run was interrupted.
    """

    def __init__(self, proposer: Proposer, ranker: Ranker, visual_prompt: str):
        self._arguments = (proposer, ranker, visual_prompt)
        self._propose, self._embed, self._show = proposer, ranker.embed_images, VISUAL_PROMPTS[visual_prompt]
        self._embed_text = lru_cache(_CACHED_TEXTS)(lambda text: ranker.embed_texts([text])[0])

    def __reduce__(self) -> tuple[type, tuple]:
        """Travels to another process without what it keeps."""
        return _Look, self._arguments

    def __call__(self, task: _Task) -> _Seen | str:
        if task.embedded:
            return _Seen(None, None, self._texts(task))
        try:
            picture = load_image(task.source)
        except DataError as error:
            return str(error)
        found = task.found
        if found is None:
            segments = self._propose(picture)
            found = {
                "height": picture.height,
                "width": picture.width,
                "counts": [segment.mask.counts for segment in segments],
                "scores": [segment.score for segment in segments],
            }
        shown = [self._show(picture, decode(segment.mask)) for segment in _segments_of(found)]
        return _Seen(found, self._embed(shown).astype(np.float16), self._texts(task))

    def _texts(self, task: _Task) -> dict[str, np.ndarray]:
        return {query: self._embed_text(query) for query in task.queries}


class _Maker:
    """Makes what the three tables lack, image by image."""

    def __init__(self, folder: Path, current: Mapping):
        self._segments, self._embeddings, self._similarities = (open_table(folder, name, current) for name in TABLES)
        self.proposed = self.ranked = 0

    def task(self, image: str, source: ImageSource, queries: Sequence[str]) -> _Task | None:
        """What must be seen before the image's rows can be completed; None if nothing."""
        missing = tuple(query for query in queries if (image, query) not in self._similarities)
        if not missing and (image,) in self._segments:
            return None
        found = self._segments.get(image)
        return _Task(source, found, found is not None and (image,) in self._embeddings, missing)

    def complete(self, image: str, seen: _Seen) -> None:
        """Add the rows of one image and its queries."""
        if seen.found is not None and (image,) not in self._segments:
            self._segments.add({"image": image, **seen.found})
            self.proposed += 1
        if seen.vectors is not None and (image,) not in self._embeddings:
            width, content = seen.vectors.shape[1], seen.vectors.tobytes()
            self._embeddings.add({"image": image, "width": width, "vectors": content})
        if not seen.texts:
            return
        embedded = self._embeddings.get(image)
        assert embedded is not None
        vectors = np.frombuffer(embedded["vectors"], np.float16).reshape(-1, embedded["width"]).astype(np.float32)
        for query, text in seen.texts.items():
            self._similarities.add({"image": image, "query": query, "similarity": (vectors @ text).tolist()})
        self.ranked += len(seen.texts)

    def write(self) -> None:
        """Write what was made since the last time."""
        for table in (self._segments, self._embeddings, self._similarities):
            table.write()


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


def _sweep(folder: Path) -> None:
    """Remove the unfinished files of killed runs."""
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink()


def _settings(proposer: Proposer, ranker: Ranker, visual_prompt: str, query: str) -> dict:
    settings = {"proposer": proposer.settings(), "visual_prompt": visual_prompt, "ranker": ranker.settings()}
    return {
        "segments": short_hash([REVISION, settings["proposer"]]),
        "ranking": short_hash([REVISION, settings]),
        "query": query,
        "settings": settings,
    }
