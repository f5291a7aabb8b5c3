"""`a3tune data check FILE`: one's own rows, what a label store has of them, and how long they are for a model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from a3tune.commands.settings import label_settings
from a3tune.data.checking import check_rows, format_rows_check
from a3tune.labels.coverage import coverage
from a3tune.labels.fitting import fitting_settings
from a3tune.labels.store import LabelStore
from a3tune.models import check_model
from a3tune.types import Sample

Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
Found = tuple[str, str, Sequence[str]]
"""What was found, in a few lines; what its problems are called; a line for each problem."""


def look_through(
    path: Path, labels: Path | None, model: str | None, overrides: Sequence[str], bar: Bar
) -> Iterator[Found]:
    """Rows, images and regions; with `labels` and `model` the usable rows also in that store, and for that model.

    `overrides` choose between the labels of a store, and what is kept of them. Raises what is wrong with the file, the
    store or the model as such.
    """
    chosen = _Labels(labels, overrides) if labels is not None else None
    if model is not None:
        check_model(model)
    with bar("Opening images") as progress:
        rows = check_rows(path, progress)
    yield format_rows_check(rows), "rows that are not usable", rows.problems
    if chosen is not None:
        yield chosen.of(rows.samples)
    if model is not None:
        yield _tokens(model, rows.samples, bar)


class _Labels:
    """Those of a store that the user means."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        run, said = label_settings(None, overrides)
        self._settings, self._folder = run.labels, folder
        self._store = LabelStore(folder, fitting_settings(folder, run.labels, said).name)

    def of(self, samples: Sequence[Sample]) -> Found:
        found = coverage(self._store, samples, self._settings.top_k, self._settings.threshold)
        labelled = found.kept + found.none_kept
        text = (
            f"labels in {self._folder}: {labelled:,} of {len(samples):,} usable rows have some, {found.none_kept:,} of "
            f"these none that is kept; of {found.no_image:,} the image is not labelled, of {found.no_question:,} the "
            "question"
        )
        return text, "rows without labels", found.problems


def _tokens(model: str, samples: Sequence[Sample], bar: Bar) -> Found:
    from a3tune.vlm.lengths import token_lengths  # PyTorch, for those who ask for it

    with bar("Counting tokens") as progress:
        lengths = token_lengths(model, samples, progress)
    fit = lengths.fitting
    text = f"tokens with {model}: {len(fit):,} of {len(samples):,} usable rows fit into {lengths.limit:,}"
    if fit:
        text += f", with {fit[0]:,} to {fit[-1]:,}, half of them at most {fit[(len(fit) - 1) // 2]:,}"
    return f"{text}; {len(lengths.problems):,} do not", "rows that the model does not take", lengths.problems
