"""Predictions and attention maps of an evaluation, in memory and on disk, line by line. Knows no model and no score."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from a3tune.errors import RunError, in_short
from a3tune.machine.digests import sealed, unsealed
from a3tune.machine.files import append, write_atomic
from a3tune.run.folder import RunFolder
from a3tune.types import Prediction, Sample

Map = NDArray[np.float16]
_KEY = "sample "
"""Starts the names of maps in their files, where one name is reserved."""
_DIGEST = "digest"
"""Of the maps, in the header of their file: they cannot be seen to be damaged."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What answers took."""

    seconds: float = 0.0
    """Answering and capturing."""
    answer_seconds: float = 0.0
    """Of these, generating the answers."""
    passes: float = 0.0
    """Forward passes of the language model while generating: those of a batch count once."""
    peak_bytes: int | None = None
    """Most memory in use on a CUDA device; None elsewhere."""

    def __add__(self, other: "Cost") -> "Cost":
        peaks = [cost.peak_bytes for cost in (self, other) if cost.peak_bytes is not None]
        return Cost(
            self.seconds + other.seconds,
            self.answer_seconds + other.answer_seconds,
            self.passes + other.passes,
            max(peaks, default=None),
        )

    def share(self, count: int) -> "Cost":
        """The share of one of `count` answers."""
        return replace(
            self,
            seconds=self.seconds / count,
            answer_seconds=self.answer_seconds / count,
            passes=self.passes / count,
        )


class PredictionLog:
    """Answers and maps so far, in memory and in the folder, if there is one.

    What one `add` wrote counts whole or not at all: its maps are written first, and all its lines must follow.
    """

    def __init__(self, folder: RunFolder | None, samples: Mapping[str, Sample]) -> None:
        self.folder = folder
        self.predictions: dict[str, Prediction] = {}
        self.maps: dict[str, Map] = {}
        self.cost = Cost()
        if folder is None:
            return
        if folder.predictions.is_file():
            self._resume(folder, samples)
        else:
            for path in _map_files(folder):  # of answers that are gone
                path.unlink()

    def add(self, answered: Sequence[tuple[Prediction, Map]], cost: Cost) -> None:
        new = [(prediction, values) for prediction, values in answered if prediction.id not in self.predictions]
        if self.folder:
            shard = self.folder.maps / f"{len(self.predictions):07d}.safetensors"
            lines = [_line(prediction, cost.share(len(new))) for prediction, _ in new]
            try:
                write_atomic(shard, _map_file({prediction.id: values for prediction, values in new}))
                append(self.folder.predictions, "".join(lines).encode())
            except OSError as error:
                raise RunError(
                    f"{self.folder.path}: cannot be written: {error.strerror}; make room and run the same command again"
                ) from error
        self.predictions |= {prediction.id: prediction for prediction, _ in new}
        self.maps |= {prediction.id: values for prediction, values in new}
        self.cost += cost

    def take_over(self, predictions: Mapping[str, Prediction], maps: Mapping[str, Map], cost: Cost) -> None:
        """Start from what the log of the first process holds."""
        self.predictions, self.maps, self.cost = dict(predictions), dict(maps), cost

    def score_reports(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Give predictions, by sample id, the report metrics that were computed once all were there."""
        self.predictions |= {name: replace(self.predictions[name], report=values) for name, values in scores.items()}
        if self.folder:
            lines = _read_lines(self.folder.predictions)
            again = [_line(self.predictions[prediction.id], cost) for prediction, cost in lines]
            write_atomic(self.folder.predictions, "".join(again).encode())

    def _resume(self, folder: RunFolder, samples: Mapping[str, Sample]) -> None:
        lines = _read_lines(folder.predictions)
        for prediction, _ in lines:
            sample = samples.get(prediction.id)
            if sample is None or (sample.prompt, sample.answer) != (prediction.prompt, prediction.answer):
                raise RunError(
                    f"{folder.predictions}: sample {prediction.id!r} is not among those to evaluate; "
                    "choose another output folder"
                )
        answered = {prediction.id for prediction, _ in lines}
        for path in _map_files(folder):
            maps = _read_map_file(path)
            if maps.keys() <= answered:
                self.maps |= maps
            else:
                path.unlink()
        whole = [(prediction, cost) for prediction, cost in lines if prediction.id in self.maps]
        for prediction, cost in whole:
            self.predictions[prediction.id] = prediction
            self.cost += cost
        # A line that was cut short is removed: the next one must not continue it.
        write_atomic(folder.predictions, "".join(_line(*line) for line in whole).encode())


_COST, _PREDICTION = TypeAdapter(Cost), TypeAdapter(Prediction)


def _line(prediction: Prediction, cost: Cost) -> str:
    return json.dumps(sealed(asdict(prediction) | {"cost": asdict(cost)}), ensure_ascii=False) + "\n"


def _read_lines(path: Path) -> list[tuple[Prediction, Cost]]:
    """Predictions and what they took; a last line without its end was cut short and is left out."""
    lines = path.read_bytes().split(b"\n")[:-1]
    predictions = []
    for number, line in enumerate(lines, start=1):
        try:
            row = unsealed(json.loads(line))
            cost = _COST.validate_python(row.pop("cost"))
            predictions.append((_checked(_PREDICTION.validate_python(row)), cost))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise RunError(f"{path}:{number}: expected a prediction, the line is damaged; remove it") from None
    return predictions


def _checked(prediction: Prediction) -> Prediction:
    if not all(map(math.isfinite, prediction.attention.values())):
        raise ValueError("a score is no number")
    return prediction


def read_predictions(folder: RunFolder) -> list[Prediction]:
    """Complete lines of `predictions.jsonl`. Raises RunError when there is none or a line is damaged."""
    return [prediction for prediction, _ in _lines_of(folder)]


def _lines_of(folder: RunFolder) -> list[tuple[Prediction, Cost]]:
    if not folder.predictions.is_file():
        raise RunError(f"{folder.path}: holds no {folder.predictions.name}; evaluate first")
    return _read_lines(folder.predictions)


def read_maps(folder: RunFolder) -> dict[str, Map]:
    """Attention maps in `maps/` by sample id; see `Results.maps`. Raises RunError if one cannot be read."""
    maps: dict[str, Map] = {}
    for path in _map_files(folder):
        maps |= _read_map_file(path)
    return maps


def _map_files(folder: RunFolder) -> list[Path]:
    return sorted(folder.maps.glob("*.safetensors"))


def _map_file(maps: Mapping[str, Map]) -> bytes:
    """Maps by sample id as a safetensors file that holds their digest."""
    tensors = {_KEY + name: values for name, values in maps.items()}
    return save(tensors, {_DIGEST: _digest_of(tensors)})


def _read_map_file(path: Path) -> dict[str, Map]:
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            maps: dict[str, Map] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.get(_DIGEST, _digest_of(maps)) != _digest_of(maps):
            raise ValueError("its content does not fit its digest")
        for name, values in maps.items():
            if values.dtype != np.float16 or values.ndim != 1 or not (np.isfinite(values) & (values >= 0)).all():
                raise ValueError(f"{name[:80]} is no attention map")
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: cannot be read ({in_short(error)}); remove it, and evaluate again") from None
    return {name.removeprefix(_KEY): values for name, values in maps.items()}


def _digest_of(tensors: Mapping[str, Map]) -> str:
    """SHA-256 of names, types, shapes and values."""
    digest = sha256()
    for name, values in sorted(tensors.items()):
        digest.update(json.dumps([name, str(values.dtype), values.shape]).encode() + values.tobytes())
    return digest.hexdigest()


def read_cost(folder: RunFolder) -> Cost:
    """What all answers of `predictions.jsonl` took. Raises as `read_predictions`."""
    return sum((cost for _, cost in _lines_of(folder)), Cost())
