"""The labels of a data set on disk: segments, how they rank, and which labels follow. Resumable at any moment.

A store is a folder of three tables of parquet shards. Each table lives under a hash of the settings that its rows
depend on, so that a changed setting makes again just what it must, and nothing is ever mixed:

    segments/<proposer>/             image -> its candidate segments
    embeddings/<ranking>/            image -> a vector for each segment
    similarities/<ranking>/          image, query -> a similarity for each segment

An image is named by the hash of its content; <ranking> covers proposer, visual prompt and ranker. Beside the tables
`stored.py` keeps what runs have finished with. Top-K is no part of the store: it is taken when labels are read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from a3tune.data.images import content_hash, describe, load_image
from a3tune.errors import ConfigError, DataError, LabelError
from a3tune.labels.make import LabelMaker, RankedSegments, similarity
from a3tune.labels.rank import format_query
from a3tune.labels.rows import TABLES, open_table
from a3tune.labels.stored import StoredSettings, none_found, stored_settings, write_settings
from a3tune.machine import cluster, workers
from a3tune.machine.files import locked
from a3tune.machine.hashes import short_hash
from a3tune.types import ImageSource, Labels, Rle, Sample, Segment

SHARD_IMAGES = 32
"""Images between two writes: the most that a killed run loses."""
_CACHED_TEXTS = 2**14
"""Vectors of queries that a worker keeps: templates ask the same of many images."""
BACKENDS = {"process": workers.in_order, "ray": cluster.in_order}
"""Where the workers are: processes of this machine, or actors of a Ray cluster."""


@dataclass(frozen=True, slots=True)
class LabelRun:
    """What `label_images` did."""

    settings: str
    """Name of the settings in the store, by which the labels are read."""
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
    maker: LabelMaker,
    folder: Path,
    *,
    given: Mapping[str, Any] | None = None,
    workers: int = 1,
    backend: Literal["process", "ray"] = "process",
    progress: Callable[[int, int], None] | None = None,
) -> LabelRun:
    """Propose and rank the segments of every sample's image into the store at `folder`.

    Images run through the proposer once, segments through the ranker once per visual prompt, query texts once. What the
    store holds already is not made again. An interrupted run goes on where it was; at most `SHARD_IMAGES` images are
    made twice. With several `workers`, or with those of a Ray cluster, images are shared out to processes of one thread
    each, which read images and load the models by their paths; only this process writes, and the store is the same.
    `progress(done, total)` is called after every image. `given` are the settings behind `maker` as a user gave them.

    Raises:
        ConfigError: a malformed query, less than one worker, or no Ray.
        LabelError: a sample lacks a field of the query, the store is damaged, or a worker died.
        OutputError: the disk refuses; what was written before stays.
        RunError: another run writes to this store.
    """
    if workers < 1:
        raise ConfigError(f"workers: expected an integer >= 1, got {workers}")
    texts = [format_query(maker.query, sample) for sample in samples]
    settings = StoredSettings.of(maker, given)
    images, failures = _group_by_image(samples, texts)
    with locked(folder):
        _sweep(folder)
        tables = _Tables(folder, settings)
        tasks = (tables.task(image, source, queries) for image, (source, queries) in images.items())
        looks = BACKENDS[backend](_Look(maker), tasks, workers)
        try:
            for done, (image, (source, _)) in enumerate(images.items(), start=1):
                seen = next(looks)
                if isinstance(seen, str):
                    failures[describe(source)] = seen
                elif seen is not None:
                    tables.complete(image, seen)
                if done % SHARD_IMAGES == 0:
                    tables.write()
                if progress:
                    progress(done, len(images))
        finally:
            looks.close()
            tables.write()
        if settings.name not in {known.name for known in stored_settings(folder)}:
            write_settings(folder, settings)
    return LabelRun(settings.name, len(images), tables.proposed, tables.ranked, failures)


class StoredImage(NamedTuple):
    """An image as the store knows it."""

    hash: str
    """SHA-256 of its encoded bytes; tells nothing of the patient."""
    height: int
    width: int


class LabelStore:
    """Reads the labels in a folder that were made with some settings.

    `settings` is their name (`StoredSettings.name`); None takes those of the folder, if it holds labels of one kind.

    Raises:
        LabelError: the folder holds no such labels, or damaged ones, or without `settings` those of several.
    """

    def __init__(self, folder: Path, settings: str | None = None):
        self._folder = folder
        self.settings = _chosen(folder, settings)
        self._segments = open_table(folder, "segments", self.settings)
        self._similarities = open_table(folder, "similarities", self.settings)
        self._image_of: dict[ImageSource, str] = {}
        self._segments_hash: dict[str, str] = {}

    def labels(self, sample: Sample, top_k: int | None = 4, threshold: float | None = None) -> Labels:
        """The segments that guide the attention for a sample, best first (Eq. 3; `rank.top_k` says what K and tau do).

        Raises:
            LabelError: the sample's image or query is not in the store.
            DataError: its image cannot be read.
        """
        segments_row = self._segments_row(sample)
        similarity = np.asarray(self._ranked(sample, segments_row["image"]))
        segments = tuple(_segments_of(segments_row))
        if len(segments) != len(similarity):
            raise LabelError(
                f"{self._folder}: holds {len(segments)} segments of the image of sample {sample.id}, but "
                f"{len(similarity)} similarities: its tables are of different runs; label into a new folder"
            )
        return RankedSegments(segments, similarity).labels(sample.id, top_k, threshold)

    def content(self, sample: Sample) -> str:
        """Short hash of all that `labels` chooses from: the segments of a sample's image, and how its query ranks them.

        Raises as `labels`.
        """
        segments_row = self._segments_row(sample)
        image = segments_row["image"]
        if image not in self._segments_hash:
            self._segments_hash[image] = short_hash(
                [segments_row["height"], segments_row["width"], segments_row["counts"]]
            )
        return short_hash([self._segments_hash[image], self._ranked(sample, image)])

    def image(self, sample: Sample) -> StoredImage:
        """Name and size of a sample's image.

        Raises:
            LabelError: the image is not in the store.
            DataError: it cannot be read.
        """
        segments_row = self._segments_row(sample)
        return StoredImage(segments_row["image"], segments_row["height"], segments_row["width"])

    def _ranked(self, sample: Sample, image: str) -> list[float]:
        """A similarity for each segment of the image."""
        ranked = self._similarities.get(image, format_query(self.settings.query, sample))
        if ranked is None:
            raise self._lacks(sample, "question")
        return ranked["similarity"]

    def _segments_row(self, sample: Sample) -> dict:
        if sample.image not in self._image_of:
            self._image_of[sample.image] = content_hash(sample.image)
        segments_row = self._segments.get(self._image_of[sample.image])
        if segments_row is None:
            raise self._lacks(sample, "image")
        return segments_row

    def _lacks(self, sample: Sample, what: str) -> LabelError:
        return LabelError(f"sample {sample.id}: its {what} has no labels in {self._folder}; run `a3tune label` on it")


class _Task(NamedTuple):
    """What is to be seen in one image."""

    source: ImageSource
    segments_row: dict | None
    """Its row of segments, if the store has it."""
    embedded: bool
    """Whether the store has the vectors of these segments: only the queries are new."""
    queries: tuple[str, ...]


class _Seen(NamedTuple):
    segments_row: dict | None
    """A row of segments without the image's name; None if the store has segments and vectors."""
    vectors: np.ndarray | None
    """float16 [M, E]: the embedded segments, likewise."""
    texts: Mapping[str, np.ndarray]
    """Query -> float32 [E]."""


class _Look:
    """The costly part of an image's labels; returns why an image cannot be read."""

    def __init__(self, maker: LabelMaker):
        self._maker = maker
        self._embed_query = lru_cache(_CACHED_TEXTS)(maker.embed_query)

    def __reduce__(self) -> tuple[type, tuple]:
        """Travels to another process without what it keeps."""
        return _Look, (self._maker,)

    def __call__(self, task: _Task) -> _Seen | str:
        if task.embedded:
            return _Seen(None, None, self._texts(task))
        try:
            picture = load_image(task.source)
        except DataError as error:
            return str(error)
        segments_row = task.segments_row
        if segments_row is None:
            segments = self._maker.proposer(picture)
            segments_row = {
                "height": picture.height,
                "width": picture.width,
                "counts": [segment.mask.counts for segment in segments],
                "scores": [segment.score for segment in segments],
            }
        return _Seen(segments_row, self._maker.embed_segments(picture, _segments_of(segments_row)), self._texts(task))

    def _texts(self, task: _Task) -> dict[str, np.ndarray]:
        return {query: self._embed_query(query) for query in task.queries}


class _Tables:
    """The three tables of some settings, completed image by image."""

    def __init__(self, folder: Path, settings: StoredSettings):
        self._segments, self._embeddings, self._similarities = (open_table(folder, name, settings) for name in TABLES)
        self.proposed = self.ranked = 0

    def task(self, image: str, source: ImageSource, queries: Sequence[str]) -> _Task | None:
        """What must be seen before the image's rows can be completed; None if nothing."""
        missing = tuple(query for query in queries if (image, query) not in self._similarities)
        if not missing and (image,) in self._segments:
            return None
        segments_row = self._segments.get(image)
        return _Task(source, segments_row, segments_row is not None and (image,) in self._embeddings, missing)

    def complete(self, image: str, seen: _Seen) -> None:
        """Add the rows of one image and its queries."""
        if seen.segments_row is not None and (image,) not in self._segments:
            self._segments.add({"image": image, **seen.segments_row})
            self.proposed += 1
        if seen.vectors is not None and (image,) not in self._embeddings:
            width, content = seen.vectors.shape[1], seen.vectors.tobytes()
            self._embeddings.add({"image": image, "width": width, "vectors": content})
        if not seen.texts:
            return
        embedded = self._embeddings.get(image)
        assert embedded is not None
        vectors = np.frombuffer(embedded["vectors"], np.float16).reshape(-1, embedded["width"])
        for query, text in seen.texts.items():
            self._similarities.add({"image": image, "query": query, "similarity": similarity(vectors, text).tolist()})
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


def _chosen(folder: Path, name: str | None) -> StoredSettings:
    stored = {settings.name: settings for settings in stored_settings(folder)}
    if not stored or name not in (None, *stored):
        raise none_found(folder)
    if name is None and len(stored) > 1:
        raise LabelError(
            f"{folder}: holds labels of {len(stored)} settings; say which. `a3tune label status` shows them"
        )
    return stored[name or next(iter(stored))]
