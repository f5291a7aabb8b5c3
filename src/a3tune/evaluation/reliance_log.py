"""Answers with parts of the images hidden, on disk: `reliance.jsonl`, line by line. Knows no model and no score.

Its first line says how they were made and which answers to the whole images they belong to.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from a3tune.errors import RunError
from a3tune.machine.files import write_atomic
from a3tune.metrics.reliance import Occluded, reliance_scores
from a3tune.run.folder import RunFolder
from a3tune.types import Prediction

_RECORD = TypeAdapter(Occluded)
_ANSWERS = "answers"
"""Key of the head: what the answers to the whole images belong to."""


class RelianceLog:
    """Records so far, in memory and in the folder, if there is one."""

    def __init__(self, folder: RunFolder | None, way: Mapping[str, Any], answers: Mapping[str, Any]) -> None:
        """Goes on with what the folder holds. Raises RunError if that was made in another way.

        Args:
            way: how parts are hidden (`reliance.Occluder.about`), JSON values.
            answers: what the answers to the whole images belong to (`PredictionLog`), JSON values.
        """
        self.path = folder.reliance if folder else None
        self.records: dict[str, Occluded] = {}
        if self.path is None:
            return
        head = json.loads(json.dumps({**way, _ANSWERS: answers}))
        if self.path.is_file():
            earlier, self.records = _read(self.path)
            for name, now in head.items():
                if earlier.get(name) != now:
                    raise RunError(
                        f"{self.path}: was measured with {name}={_short(earlier.get(name))}, not {_short(now)}; "
                        "remove it, or choose another output folder"
                    )
        # Written again without a line that was cut short: the next one must not continue it.
        write_atomic(self.path, "".join([_line(head), *map(_record_line, self.records.values())]).encode())

    def add(self, records: Sequence[Occluded]) -> None:
        self.records |= {record.id: record for record in records}
        if self.path is None:
            return
        try:
            with self.path.open("ab") as file:
                file.write("".join(map(_record_line, records)).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written: {error.strerror}; make room and run the same command again"
            ) from error


def read_reliance(folder: RunFolder) -> dict[str, Occluded]:
    """Records of a run by sample id; none if nothing was hidden. Raises RunError for a damaged file."""
    return _read(folder.reliance)[1] if folder.reliance.is_file() else {}


def read_way(folder: RunFolder) -> dict[str, Any] | None:
    """How parts of the images of a run were hidden (`reliance.Occluder.about`); None if they were not.

    Raises RunError for a damaged file.
    """
    if not folder.reliance.is_file():
        return None
    return {name: value for name, value in _read(folder.reliance)[0].items() if name != _ANSWERS}


def with_reliance(predictions: Sequence[Prediction], records: Mapping[str, Occluded]) -> list[Prediction]:
    """Predictions with the scores of what they rest on, where that was measured.

    Raises RunError for a record that belongs to another answer than that of its sample.
    """
    scored = []
    for prediction in predictions:
        record = records.get(prediction.id)
        if record is not None and record.intact != prediction.prediction:
            raise RunError(
                f"reliance.jsonl: was measured of another answer to sample {prediction.id!r:.80} than the one in "
                "predictions.jsonl; remove it, and evaluate with --occlude again"
            )
        scores = {} if record is None else reliance_scores(prediction, record)
        scored.append(replace(prediction, reliance=scores))
    return scored


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Occluded]]:
    """Head and complete lines; a last line without its end was cut short and is left out."""
    head: dict[str, Any] = {}
    records: dict[str, Occluded] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            if number == 1:
                head = dict(row)
            else:
                record = _RECORD.validate_python(row)
                records[record.id] = record
        except (ValueError, TypeError, RecursionError):
            raise RunError(f"{path}:{number}: is damaged; remove the file, and evaluate with --occlude again") from None
    return head, records


def _record_line(record: Occluded) -> str:
    return _line(asdict(record))


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
