"""A score of your own, computed for answers that are there already (docs/howto/own-metric.md).

python examples/own_metric.py --quick --out out
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from a3tune.commands.evaluate import evaluate_run
from a3tune.config import load_config
from a3tune.data.phantom import write_phantom
from a3tune.metrics.catalogue import METRICS, Metric
from a3tune.metrics.vqa import normalise
from a3tune.report.write import compare


def exact_match(prediction: str, answer: str, answer_type: str, options: Sequence[str]) -> float | None:
    """1 if both texts are the same after normalisation; of open questions."""
    return float(normalise(prediction) == normalise(answer)) if answer_type == "open" else None


def words(prediction: str, answer: str, answer_type: str, options: Sequence[str]) -> float:
    """Length of the answer in words: recall rewards long ones."""
    return float(len(prediction.split()))


def main(out: Path, quick: bool) -> None:
    rows = write_phantom(out / "scans", {"test": 1 if quick else 20})["test"]
    for name, tokens in (("short", 2), ("long", 16)):
        given = [f"data.test={rows}", f"output={out / name}", f"evaluation.max_new_tokens={tokens}"]
        evaluate_run(load_config(None, given), None, lambda done, total: None)
    runs = [out / "short", out / "long"]
    print(compare(runs, [".md"])[0])

    METRICS["exact_match"] = Metric("Exact match", "Share answered to the word.", exact_match)
    METRICS["words"] = Metric("Words", "Words of the answer.", words, percent=False, lower_is_better=True)
    print(compare(runs, [".md"])[0])  # nothing is asked again


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for everything it writes")
    parser.add_argument("--quick", action="store_true", help="one patient")
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
