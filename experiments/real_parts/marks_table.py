"""Answers of marks.yaml's runs -> a table: right answers by test, what hiding changes, LoRA against A3Tune.

python marks_table.py runs

`runs` holds `METHOD-SEED/TEST` for each method, seed and test, as README.md's commands write them.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from a3tune.evaluation.predictions import read_predictions
from a3tune.evaluation.results import scores
from a3tune.metrics.stats import paired_difference, seeds_interval
from a3tune.run.folder import RunFolder
from a3tune.types import Prediction

TESTS = ("disagree", "none", "agree", "tag")
SCORES = ("open_recall", "attention_mass", "reliance_inside", "reliance_elsewhere", "accuracy_outside_hidden")


def main() -> None:
    runs = Path(sys.argv[1])
    found: dict[str, list[str]] = defaultdict(list)
    for folder in sorted(runs.glob("*-*")):
        method, _, seed = folder.name.rpartition("-")
        found[method].append(seed)
    for kind in ("side", "part"):
        print(f"\n{kind}: {', '.join(f'{method} {len(seeds)} seeds' for method, seeds in found.items())}\n")
        for test in TESTS:
            own = {
                method: [
                    [one for one in read_predictions(RunFolder(runs / f"{method}-{seed}" / test)) if of(one, kind)]
                    for seed in seeds
                    if (runs / f"{method}-{seed}" / test).is_dir()
                ]
                for method, seeds in found.items()
            }
            for score in SCORES:
                row = [f"{method} {text}" for method, seeds in own.items() if (text := mean(seeds, score))]
                if all(own.get(name) for name in ("lora", "a3tune")) and row:
                    row.append(f"difference {difference(own['a3tune'], own['lora'], score)}")
                if row:
                    print(f"{test:9} {score:24} " + "; ".join(row))


def of(prediction: Prediction, kind: str) -> bool:
    return prediction.meta["question_type"] == kind


def values(seeds: Sequence[Sequence[Prediction]], score: str) -> np.ndarray:
    """[seeds, questions], NaN where there is none."""
    return np.array([[scores(one).get(score, np.nan) for one in predictions] for predictions in seeds], dtype=float)


def groups(seeds: Sequence[Sequence[Prediction]]) -> list[str]:
    return [one.meta["patient"] for one in seeds[0]]


def mean(seeds: Sequence[Sequence[Prediction]], score: str) -> str:
    """In percent, with the interval over seeds and images; "" if nobody measured it."""
    if not seeds or np.isnan(values(seeds, score)).all():
        return ""
    found = seeds_interval(values(seeds, score), groups(seeds))
    return f"{100 * found.mean:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def difference(first: Sequence[Sequence[Prediction]], second: Sequence[Sequence[Prediction]], score: str) -> str:
    count = min(len(first), len(second))
    found = paired_difference(values(first[:count], score), values(second[:count], score), groups(first))
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


if __name__ == "__main__":
    main()
