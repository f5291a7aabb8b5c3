"""What a training is started with, by content: rows in their order, labels, base. Recorded once, compared ever after.

Knows what learning depends on. Names and places do not count: what was moved, or called otherwise, is the same.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from a3tune.config import RunConfig
from a3tune.data.content import other_part, row_contents
from a3tune.errors import RunError, shown
from a3tune.evaluation.identity import PARTS
from a3tune.labels.store import LabelStore
from a3tune.machine.hashes import difference
from a3tune.models import base_hashes
from a3tune.run.folder import RunFolder, read_json
from a3tune.types import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingIdentity:
    parts: Sequence[str]
    """Of a row, that are learnt from (`data.content`); "labels" are those of the store."""
    rows: Sequence[str]
    """`row_contents` of these parts."""
    base: Mapping[str, str]
    """`models.base_hashes`."""
    validation: Mapping[str, str] = field(default_factory=dict)
    """Sample id -> `row_contents` of what is measured while it trains; empty if nothing is."""


_IDENTITY = TypeAdapter(TrainingIdentity)


def identity_of(
    config: RunConfig,
    samples: Sequence[Sample],
    labels: LabelStore | None,
    validation: Sequence[Sample] = (),
    known: Mapping[str, str] | None = None,
) -> TrainingIdentity:
    """What a training is made of. Raises DataError or LabelError for a row that cannot be used.

    `validation` is measured while it trains; `known` holds hashes of its labels in the store, by sample id.
    """
    parts = ["prompt", "answer", "image"]
    if config.labels.source == "truth":
        parts.append("regions")
    if labels is not None:
        parts.append("labels")
    more = {} if labels is None else {"labels": labels.content}
    of_store = {"labels": lambda sample: (known or {}).get(sample.id, "none")}
    measured = row_contents(validation, [*PARTS, "labels"], of_store)
    by_id = dict(zip((sample.id for sample in validation), measured, strict=True))
    return TrainingIdentity(parts, row_contents(samples, parts, more), base_hashes(config.model.path), by_id)


def is_recorded(folder: RunFolder) -> bool:
    """Whether a run knows what it was started with; those of earlier versions do not."""
    return folder.training_identity.is_file()


def record(folder: RunFolder, identity: TrainingIdentity, *, started: bool) -> None:
    """Write what a run is started with; of one that was `started` before it stays as it is, if it was written then."""
    if started and is_recorded(folder):
        return
    if started:
        logger.warning(
            "%s: does not say which rows, labels and base it was started with, as runs of earlier versions do not: "
            "those of now are taken for them",
            folder.path,
        )
    folder.write_json(folder.training_identity.name, asdict(identity))


def refuse_other_content(folder: RunFolder, now: TrainingIdentity, samples: Sequence[Sample]) -> None:
    """Raise RunError naming what is not as it was when the run in `folder` was started, where it knows that."""
    if not is_recorded(folder):
        return
    then = _read(folder)
    what = _other_rows(then, now, samples) or _other_base(then.base, now.base) or _other_validation(then, now)
    if what:
        raise RunError(
            f"{folder.path}: holds a run that was started with other content: {what}. Put it back as it was to go on, "
            "or choose another output"
        )


def other_base(adapter: Path, name: str) -> str | None:
    """What of a base is not as it was when an adapter was trained on it, in words; None if nothing, or nobody knows."""
    folder = RunFolder.of_adapter(adapter)
    return _other_base(_read(folder).base, base_hashes(name)) if folder and is_recorded(folder) else None


def _read(folder: RunFolder) -> TrainingIdentity:
    again = "choose another output, or delete it if rows, labels and base are still those that the run was started with"
    found = read_json(folder.training_identity, again)
    try:
        return _IDENTITY.validate_python(found)
    except ValueError:
        raise RunError(f"{folder.training_identity}: cannot be read, it is damaged; {again}") from None


def _other_rows(then: TrainingIdentity, now: TrainingIdentity, samples: Sequence[Sample]) -> str | None:
    if then.rows == now.rows:
        return None
    if then.parts != now.parts:
        return f"rows with {', '.join(then.parts)}, now with {', '.join(now.parts)}"
    if sorted(then.rows) == sorted(now.rows):
        return "its rows are in another order"
    pairs = list(zip(then.rows, now.rows, samples, strict=False))
    number, what = next(
        (
            (number, f"the {other_part(now.parts, old, new)} of row {number} (sample {shown(sample.id, 80)})")
            for number, (old, new, sample) in enumerate(pairs, start=1)
            if old != new
        ),
        (len(pairs) + 1, f"row {len(pairs) + 1}"),
    )
    if len(then.rows) != len(now.rows):
        return f"it had {len(then.rows)} rows, there are {len(now.rows)} now, the first that differs is row {number}"
    return f"{what} is another"


def _other_validation(then: TrainingIdentity, now: TrainingIdentity) -> str | None:
    names = [*then.validation, *now.validation]
    other = next((name for name in names if then.validation.get(name) != now.validation.get(name)), None)
    return None if other is None else f"sample {shown(other, 80)} of data.validation is another, or was not among them"


def _other_base(then: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    file = difference(then, now) if then and now else None  # empty: a model on the Hub that is not here
    return f"of the base model {file}" if file else None
