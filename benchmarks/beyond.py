"""What goes beyond the paper, one change at a time, on the demo's data, labels, steps and seeds.

    python benchmarks/beyond.py --out runs/beyond --seeds 0 1

Every run is A3Tune with one change; a difference is paired with A3Tune of the same seed, question by question, and its
interval resamples seeds and patients. Both the validation and the test patients answer: what is chosen is chosen on the
first. Resumable, about six minutes for each run and seed. Writes `beyond.json` and `beyond.md` into `--out`.
"""

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from measure import CLEAN, about, table, write

from a3tune.commands.evaluate import evaluate_run
from a3tune.commands.label import label
from a3tune.commands.train import fine_tune
from a3tune.config import RunConfig
from a3tune.data.phantom import write_phantom
from a3tune.data.rows import read_rows
from a3tune.demo.plan import plan_demo
from a3tune.evaluation.predictions import read_predictions
from a3tune.evaluation.results import clusters, scores
from a3tune.metrics.stats import Estimate, paired_difference, seeds_interval
from a3tune.run.folder import RunFolder
from a3tune.training import train
from a3tune.types import Labels, Sample

REFERENCE = "a3tune"
CHANGES = {
    REFERENCE: [],
    "fixed heads": ["alignment.head_selection=fixed"],
    "running heads": ["alignment.head_selection=running"],
    "no labels": ["labels.source=none"],
}
SHARES = {"labels of 50 %": 0.5, "labels of 25 %": 0.25, "labels of 10 %": 0.1}
"""Of the patients; the others' questions teach the answers alone."""
SPLITS = ("validation", "test")
METRICS = {
    "attention_mass": "Attention mass",
    "pointing": "Pointing",
    "patch_auroc": "Patch AUROC",
    "coverage": "Coverage",
    "open_recall": "Open recall",
    "closed_accuracy": "Closed accuracy",
}
"""The first four where a region is known."""
QUICK = ["patients.train=2", "patients.validation=3", "patients.test=3", "training.max_steps=2"]
QUICK += ["training.log_steps=1", "evaluation.max_new_tokens=3"]


@contextmanager
def labels_of(share: float, samples: Sequence[Sample], seed: int) -> Iterator[None]:
    """While this is open, trainings have the labels of some of the patients only."""
    patients = sorted({sample.meta["patient"] for sample in samples})
    kept = set(random.Random(seed).sample(patients, max(1, round(share * len(patients)))))
    source = train.region_source

    def region_source(config: RunConfig, *of: Any) -> train.RegionSource:
        regions_for = source(config, *of)

        def some(sample: Sample, height: int, width: int) -> Labels | None:
            return regions_for(sample, height, width) if sample.meta["patient"] in kept else None

        return some

    with patch.object(train, "region_source", region_source):
        yield


def work(config: RunConfig, share: float) -> dict[str, dict[str, np.ndarray]]:
    """Train and answer; returns every metric of every question by split, NaN where it is not defined."""
    assert config.data.train is not None
    with labels_of(share, read_rows(config.data.train), config.training.seed):
        fine_tune(config, _silent)
    found = {}
    for split in SPLITS:
        data = replace(config.data, test=config.data.train.with_name(f"{split}.jsonl"))
        answers = config.output.with_name(f"{config.output.name}_{split}")
        evaluate_run(replace(config, data=data, output=answers), RunFolder(config.output).adapter, _silent)
        assert data.test is not None
        by_id = {prediction.id: prediction for prediction in read_predictions(RunFolder(answers))}
        values = [scores(by_id[sample.id]) for sample in read_rows(data.test)]
        found[split] = {name: np.array([own.get(name, np.nan) for own in values]) for name in METRICS}
    return found


def compare(runs: Mapping[str, Sequence[Mapping[str, np.ndarray]]], samples: Sequence[Sample]) -> dict[str, dict]:
    """Means of each run over seeds and questions, and differences from A3Tune."""
    groups = clusters(samples)
    rows: dict[str, dict] = {}
    for name, tables in runs.items():
        stacked = {metric: np.stack([own[metric] for own in tables]) for metric in METRICS}
        rows[name] = {"means": {metric: seeds_interval(values, groups) for metric, values in stacked.items()}}
        if name != REFERENCE:
            reference = {metric: np.stack([own[metric] for own in runs[REFERENCE]]) for metric in METRICS}
            differences = {metric: paired_difference(stacked[metric], reference[metric], groups) for metric in METRICS}
            rows[name]["differences"] = differences
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=[*CHANGES, *SHARES], help="of the changes (all)")
    parser.add_argument("--quick", action="store_true", help="few patients and one step, to see that it works")
    args = parser.parse_args()
    shared = [*CLEAN, *(QUICK if args.quick else [])]
    plan = plan_demo(args.out, shared)
    if not (args.out / "data" / "test.jsonl").is_file():
        write_phantom(args.out / "data", plan.recipe.patients, seed=plan.recipe.seed)
    label(plan.configs["a3tune"], _silent)
    chosen = dict.fromkeys([REFERENCE, *(args.only or [*CHANGES, *SHARES])])
    results: dict[str, list[dict[str, dict[str, np.ndarray]]]] = {name: [] for name in chosen}
    for name in chosen:
        for seed in args.seeds:
            changed = [*shared, *CHANGES.get(name, []), f"training.seed={seed}"]
            output = args.out / f"{name} {seed}".replace(" %", "").replace(" ", "_")
            config = replace(plan_demo(args.out, changed).configs["a3tune"], output=output)
            results[name].append(work(config, SHARES.get(name, 1.0)))
            print(f"{name}, seed {seed}: done", flush=True)
    record: dict[str, object] = {"about": about()}
    lines = [f"- {name}: {value}" for name, value in about().items()]
    for split in SPLITS:
        samples = read_rows(args.out / "data" / f"{split}.jsonl")
        rows = compare({name: [own[split] for own in tables] for name, tables in results.items()}, samples)
        record[split] = rows
        cells = [[name, *(_cell(row, metric) for metric in METRICS)] for name, row in rows.items()]
        lines += ["", f"{split.title()}, {len(samples)} questions", "", table(["Run", *METRICS.values()], cells)]
    write(args.out / "beyond", record, "\n".join(lines))


def _cell(row: Mapping[str, Mapping[str, Estimate]], metric: str) -> str:
    """A mean, or a difference with a star where its interval excludes 0; times 100."""
    own = row.get("differences", row["means"])[metric]
    sign, star = ("+", "*" if own.low > 0 or own.high < 0 else "") if "differences" in row else ("", "")
    return f"{100 * own.mean:{sign}.1f}{star} [{100 * own.low:{sign}.1f}, {100 * own.high:{sign}.1f}]"


def _silent(done: int, total: int) -> None:
    pass


if __name__ == "__main__":
    main()
