"""For how many samples a store has labels. Makes none."""

from collections.abc import Sequence
from dataclasses import dataclass

from a3tune.errors import A3TuneError
from a3tune.labels.store import LabelStore
from a3tune.types import Sample


@dataclass(frozen=True, slots=True)
class Coverage:
    """Samples by what a store has of them: the four counts are all samples."""

    kept: int
    """Their labels hold a region, or more."""
    none_kept: int
    """They have labels, and no region of them is kept: an image without segments, or all below the threshold."""
    no_image: int
    """Their image was not labelled."""
    no_question: int
    """Their image was, their question was not."""
    problems: tuple[str, ...]
    """A line for each sample of the last two kinds."""


def coverage(store: LabelStore, samples: Sequence[Sample], top_k: int | None, threshold: float | None) -> Coverage:
    """Look every sample up; `top_k` and `threshold` as `LabelStore.labels` takes them."""
    kept = none_kept = no_image = no_question = 0
    problems: list[str] = []
    for sample in samples:
        try:
            store.image(sample)
        except A3TuneError as error:
            no_image += 1
            problems.append(str(error))
            continue
        try:
            segments = store.labels(sample, top_k, threshold).segments
        except A3TuneError as error:
            no_question += 1
            problems.append(str(error))
            continue
        kept += bool(segments)
        none_kept += not segments
    return Coverage(kept, none_kept, no_image, no_question, tuple(problems))
