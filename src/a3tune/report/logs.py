"""`metrics.jsonl`, the log of a training -> what the report shows of it: curves, heads, experts."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from a3tune.errors import RunError, in_short, shown
from a3tune.report.records import CURVES, Curve, ExpertUse, validation_curve


def read_log(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a training log; none if there is no file. Raises RunError where the report cannot use them."""
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        for read in (curves_from_log, experts_from_log, heads_from_log):
            read(lines)  # what the page takes from them
        return lines
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise RunError(
            f"{path}: expected one JSON object per line, as training logs them: {in_short(error)}; train again"
        ) from None


def curves_from_log(lines: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """What is drawn of the lines of `metrics.jsonl`: `CURVES`, and those of the validation as far as it was logged."""
    logged = [line for line in lines if "step" in line]
    curves: dict[str, Curve] = {}
    for name in dict.fromkeys([*CURVES, *(key for line in logged for key in line if validation_curve(key))]):
        points = [(_finite(line["step"]), _finite(line[name])) for line in logged if line.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            curves[name] = Curve(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))
    return curves


def heads_from_log(lines: Iterable[Mapping[str, Any]]) -> np.ndarray | None:
    """Share of the logged steps in which each head was aligned, float [L, H]; None if the run aligned nothing."""
    selected = [[list(map(_bit, row)) for row in line["heads_selected"]] for line in lines if "heads_selected" in line]
    return np.mean(selected, axis=0) if selected else None


def experts_from_log(lines: Iterable[Mapping[str, Any]]) -> dict[Literal["query", "key"], ExpertUse]:
    """The experts' use in the last line of `metrics.jsonl` that holds it."""
    experts: dict[Literal["query", "key"], ExpertUse] = {}
    for line in lines:
        for kind in ("query", "key"):
            if f"{kind}_use" in line:
                use = tuple(_finite(share) for share in line[f"{kind}_use"])
                experts[kind] = ExpertUse(use, _finite(line[f"{kind}_entropy"]))
    return experts


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a number, got {shown(value, 40)}")
    return float(value)


def _bit(value: Any) -> int:
    if value not in ("0", "1", 0, 1):
        raise ValueError(f"expected 0 or 1 for a head, got {shown(value, 40)}")
    return int(value)
