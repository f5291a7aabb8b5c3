"""Answers with parts of the images hidden, on disk: `reliance.jsonl`, line by line. Knows no model and no score.

Its first line says how they were made and which answers to the whole images they belong to.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from a3tune.errors import RunError, shown
from a3tune.machine.digests import sealed, unsealed
from a3tune.machine.files import append, write_atomic
from a3tune.metrics.reliance import Hiding, Occluded, reliance_scores
from a3tune.run.folder import RunFolder
from a3tune.types import Prediction

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Head:
    hiding: Hiding
    answers: dict[str, Any]


_HEAD, _RECORD = TypeAdapter(_Head), TypeAdapter(Occluded)


class RelianceLog:
    """Records so far, in memory and in the folder, if there is one."""

    def __init__(self, folder: RunFolder | None, hiding: Hiding, answers: Mapping[str, Any]) -> None:
        """Goes on with what the folder holds; `answers`, JSON values, are what the answers to the whole images belong
        to (`PredictionLog`). Raises RunError if something else was measured there."""
        self.path = folder.reliance if folder else None
        self.records: dict[str, Occluded] = {}
        if self.path is None:
            return
        head = _Head(hiding, json.loads(json.dumps(answers)))
        if self.path.is_file():
            earlier, self.records = _read(self.path)
            self._check(earlier, head)
        # Written again without a line that was cut short: the next one must not continue it.
        lines = [_line(head), *map(_line, self.records.values())]
        write_atomic(self.path, "".join(lines).encode())

    def add(self, records: Sequence[Occluded]) -> None:
        new = [record for record in records if record.id not in self.records]
        self.records |= {record.id: record for record in new}
        if self.path is None:
            return
        try:
            append(self.path, "".join(map(_line, new)).encode())
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written: {error.strerror}; make room and run the same command again"
            ) from error

    def _check(self, earlier: _Head, now: _Head) -> None:
        hint = "remove it, or choose another output folder"
        if earlier.answers != now.answers:
            raise RunError(f"{self.path}: belongs to answers of another model or with other settings; {hint}")
        for name, value in asdict(now.hiding).items():
            then = getattr(earlier.hiding, name)
            if then != value:
                raise RunError(f"{self.path}: was measured with {name}={_short(then)}, not {_short(value)}; {hint}")


def read_reliance(folder: RunFolder) -> tuple[Hiding | None, dict[str, Occluded]]:
    """How parts of the images of a run were hidden, and its records by sample id; None and none if they were not.

    Raises RunError for a damaged file.
    """
    if not folder.reliance.is_file():
        return None, {}
    head, records = _read(folder.reliance)
    return head.hiding, records


def with_reliance(predictions: Sequence[Prediction], records: Mapping[str, Occluded]) -> list[Prediction]:
    """Predictions with the scores of what they rest on, where that was measured.

    Raises RunError for a record that belongs to another answer than that of its sample.
    """
    scored = []
    for prediction in predictions:
        record = records.get(prediction.id)
        if record is not None and record.intact != prediction.prediction:
            raise RunError(
                f"reliance.jsonl: was measured of another answer to sample {shown(prediction.id, 80)} than the one "
                "in predictions.jsonl; remove it, and evaluate with --occlude again"
            )
        scores = {} if record is None else reliance_scores(prediction, record)
        scored.append(replace(prediction, reliance=scores))
    return scored


def _read(path: Path) -> tuple[_Head, dict[str, Occluded]]:
    """Head and complete lines; a last line without its end was cut short and is left out."""
    first, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]
    head = _validated(path, 1, first, _HEAD)
    records = [_validated(path, number, line, _RECORD) for number, line in enumerate(lines, start=2)]
    return head, {record.id: record for record in records}


def _validated(path: Path, number: int, line: bytes, kind: TypeAdapter[T]) -> T:
    try:
        return kind.validate_python(unsealed(json.loads(line)))
    except (ValueError, RecursionError):
        raise RunError(f"{path}:{number}: is damaged; remove the file, and evaluate with --occlude again") from None


def _line(value: _Head | Occluded) -> str:
    return json.dumps(sealed(asdict(value)), ensure_ascii=False) + "\n"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
