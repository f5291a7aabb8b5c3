"""What rows are, by content: whether a row is the one it was, and what of it is another. Reads images as bytes only."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from a3tune.data.images import content_hash, split_fragment
from a3tune.data.rows import region_row
from a3tune.errors import DataError
from a3tune.machine.hashes import short_hash
from a3tune.types import ImageSource, Sample

WORDS: Mapping[str, Callable[[Sample], Any]] = {
    "prompt": lambda sample: sample.prompt,
    "answer": lambda sample: sample.answer,
    "answer_type": lambda sample: [sample.answer_type, sample.options],
    "regions": lambda sample: sample.regions and [region_row(region) for region in sample.regions],
    "meta": lambda sample: dict(sample.meta),
}
"""Parts of a row that can be told without its image -> their JSON values."""


def row_contents(
    samples: Sequence[Sample], parts: Sequence[str], more: Mapping[str, Callable[[Sample], str]] | None = None
) -> list[str]:
    """For each row a text with a hash for each of some parts, in their order.

    Args:
        parts: of `WORDS`; "image", the bytes of its file; and those of `more`.
        more: parts that the caller knows: a sample -> its hash.

    Raises:
        DataError: an image cannot be read; names the sample.
    """
    files: dict[ImageSource, str] = {}
    hashes = {name: _of_words(words) for name, words in WORDS.items()} | {"image": lambda s: _image(s.image, files)}
    chosen = [(hashes | dict(more or {}))[part] for part in parts]
    contents = []
    for sample in samples:
        try:
            contents.append(" ".join(of(sample) for of in chosen))
        except DataError as error:
            raise DataError(f"sample {sample.id}: {error}") from error
    return contents


def other_part(parts: Sequence[str], then: str, now: str) -> str | None:
    """The first of the parts in which two texts of `row_contents` differ; None if they are the same."""
    if then == now:
        return None
    pairs = zip(parts, then.split(), now.split(), strict=False)
    return next((part for part, old, new in pairs if old != new), parts[-1])


def _of_words(words: Callable[[Sample], Any]) -> Callable[[Sample], str]:
    return lambda sample: short_hash(words(sample))


def _image(source: ImageSource, files: dict[ImageSource, str]) -> str:
    """`files` keeps what is hashed: many rows ask about one image, or about slices of one volume."""
    file, fragment = split_fragment(source) if isinstance(source, Path) else (source, "")
    if file not in files:
        files[file] = content_hash(file)
    return short_hash([files[file], fragment])
