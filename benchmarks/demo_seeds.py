"""The demo's comparison over several training seeds, with every ablation in one table.

    python benchmarks/demo_seeds.py --out runs/demo_seeds --seeds 0 1 2 --ablation-seeds 0 1 2 --jobs 2

All methods of a seed see the same data, labels, steps and seed. A difference is paired with LoRA's run of the same
seed, question by question; its interval resamples seeds and patients. Resumable: what is trained or answered is not
done again. Writes `results.json` and `results.md`.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from measure import CLEAN

from a3tune.commands.evaluate import evaluate_run
from a3tune.commands.label import label
from a3tune.commands.train import fine_tune
from a3tune.config import RunConfig
from a3tune.data.phantom import write_phantom
from a3tune.data.phantom.questions import GENERIC_TYPES
from a3tune.data.rows import read_rows
from a3tune.demo.plan import plan_demo
from a3tune.demo.run import label_quality_of
from a3tune.evaluation.predictions import read_predictions
from a3tune.evaluation.results import clusters, scores
from a3tune.metrics.stats import Estimate, paired_difference, seeds_interval
from a3tune.run.folder import RunFolder
from a3tune.types import Prediction, Sample

REFERENCE = "lora"
ABLATIONS = {
    "no alignment": ["alignment.weight=0"],
    "no Q-MoE": ["adapter.query_experts=0"],
    "no K-MoE": ["adapter.key_experts=0"],
    "no A3MoE": ["adapter.kind=lora"],
    "all heads": ["alignment.heads=100%"],
}
"""What each takes away from A3Tune with weak labels."""
QUICK = [
    "patients.train=2",
    "patients.validation=1",
    "patients.test=3",
    "training.max_steps=1",
    "evaluation.max_new_tokens=3",
]
METRICS = {
    "localised_open": "Open recall (localised)",
    "localised_closed": "Closed accuracy (localised)",
    "open_recall": "Open recall (all)",
    "attention_mass": "Attention mass",
    "coverage": "Coverage",
    "intensity": "Intensity",
}


@dataclass(frozen=True)
class Row:
    """One method in the table: means over seeds and questions, and differences from LoRA."""

    method: str
    seeds: int
    means: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    by_type: Mapping[str, Estimate]


def settings(folder: Path, seed: int, overrides: Sequence[str], ablations: bool) -> dict[str, RunConfig]:
    """The demo's methods, and the ablations if asked for, for one seed, each with its own run folder."""
    shared = [*CLEAN, *overrides, f"training.seed={seed}"]
    demo = plan_demo(folder, shared)
    methods = {name: config for name, config in demo.configs.items() if name in demo.recipe.methods}
    for name, change in ABLATIONS.items() if ablations else ():
        methods[name] = plan_demo(folder, [*shared, *change]).configs["a3tune"]
    return {
        name: replace(config, output=folder / f"{name} {seed}".replace(" ", "_")) for name, config in methods.items()
    }


def work(config: RunConfig, trained: bool) -> None:
    """Train and answer."""
    fine_tune(config, _silent) if trained else None
    evaluate_run(config, RunFolder(config.output).adapter if trained else None, _silent)


def score_table(predictions: Sequence[Prediction]) -> dict[str, np.ndarray]:
    """Every metric for every question, NaN where it is not defined."""
    found = []
    for prediction in predictions:
        values = scores(prediction)
        if prediction.meta["question_type"] not in GENERIC_TYPES:
            values |= {"localised_open": values.get("open_recall", np.nan)}
            values |= {"localised_closed": values.get("closed_accuracy_strict", np.nan)}
        values |= {f"type {prediction.meta['question_type']}": _answer(values)}
        found.append(values)
    names = sorted({name for values in found for name in values})
    return {name: np.array([values.get(name, np.nan) for values in found]) for name in names}


def compare(runs: Mapping[str, Mapping[int, dict[str, np.ndarray]]], samples: Sequence[Sample]) -> list[Row]:
    """One row per method from its score tables by seed; differences over the seeds that it shares with LoRA."""
    groups = clusters(samples)
    rows = []
    for method, tables in runs.items():
        stacked = {name: np.stack([table[name] for table in tables.values()]) for name in METRICS}
        shared = [seed for seed in tables if seed in runs[REFERENCE]] if method not in (REFERENCE, "base") else []
        differences = {
            name: paired_difference(
                np.stack([tables[seed][name] for seed in shared]),
                np.stack([runs[REFERENCE][seed][name] for seed in shared]),
                groups,
            )
            for name in METRICS
            if shared
        }
        types = sorted({name for table in tables.values() for name in table if name.startswith("type ")})
        by_type = {name: seeds_interval(np.stack([table[name] for table in tables.values()]), groups) for name in types}
        means = {name: seeds_interval(values, groups) for name, values in stacked.items()}
        rows.append(Row(method, len(tables), means, differences, by_type))
    return rows


def markdown(rows: Sequence[Row], about: Mapping[str, object]) -> str:
    """Both tables: means, and by question type; a star marks a difference whose interval excludes 0."""
    lines = [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", "| Method | Seeds | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for row in rows:
        cells = [_cell(row.means[name], row.differences.get(name)) for name in METRICS]
        lines.append(f"| {row.method} | {row.seeds} | " + " | ".join(cells) + " |")
    types = sorted(rows[0].by_type)
    lines += ["", "| Method | " + " | ".join(name.removeprefix("type ") for name in types) + " |"]
    lines += ["|---" * (len(types) + 1) + "|"]
    lines += [f"| {r.method} | " + " | ".join(f"{100 * r.by_type[t].mean:.1f}" for t in types) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablation-seeds", type=int, nargs="*", help="of the seeds (all)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--quick", action="store_true", help="few patients and one step, to see that it works")
    parser.add_argument("overrides", nargs="*", help="settings of the demo, key=value")
    args = parser.parse_args()
    args.overrides = [*(QUICK if args.quick else []), *args.overrides]
    demo = plan_demo(args.out, [*CLEAN, *args.overrides])
    if not (args.out / "data" / "test.jsonl").is_file():
        write_phantom(args.out / "data", demo.recipe.patients, seed=demo.recipe.seed)
    label(demo.configs["a3tune"], _silent)
    ablated = args.seeds if args.ablation_seeds is None else args.ablation_seeds
    per_seed = {seed: settings(args.out, seed, args.overrides, seed in ablated) for seed in args.seeds}
    runs_to_make = [(demo.configs["base"], False)]
    runs_to_make += [(config, True) for methods in per_seed.values() for config in methods.values()]
    for number, _ in enumerate(_done(runs_to_make, args.jobs), 1):
        print(f"{number} of {len(runs_to_make)} runs done", flush=True)
    samples = read_rows(args.out / "data" / "test.jsonl")

    def table(config: RunConfig) -> dict[str, np.ndarray]:
        by_id = {prediction.id: prediction for prediction in read_predictions(RunFolder(config.output))}
        return score_table([by_id[sample.id] for sample in samples])

    runs = {"base": {args.seeds[0]: table(demo.configs["base"])}}
    for seed, methods in per_seed.items():
        for name, config in methods.items():
            runs.setdefault(name, {})[seed] = table(config)
    rows = compare(runs, samples)
    quality = label_quality_of(demo)
    words = ["python benchmarks/demo_seeds.py --seeds", *map(str, args.seeds), "--ablation-seeds", *map(str, ablated)]
    words += args.overrides
    about = {
        "seeds": " ".join(map(str, args.seeds)),
        "training questions": len(read_rows(args.out / "data" / "train.jsonl")),
        "test questions": len(samples),
        "weak labels": f"recall of the region at K {quality.recall:.3f}, mean best IoU {quality.best_iou:.3f}",
        "machine": f"{platform.machine()}, Python {platform.python_version()}, 1 thread per run",
        "command": " ".join(words),
    }
    found = {"about": about, "rows": [asdict(row) for row in rows]}
    (args.out / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (args.out / "results.md").write_text(markdown(rows, about), encoding="utf-8")
    print(markdown(rows, about))


def _done(runs: Sequence[tuple[RunConfig, bool]], jobs: int) -> Iterator[None]:
    """`work` on each, one thread a run; with one job at a time all happens in this process."""
    if jobs == 1:
        torch.set_num_threads(1)
        yield from (work(*run) for run in runs)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from (job.result() for job in [pool.submit(work, *run) for run in runs])


def _cell(mean: Estimate, difference: Estimate | None) -> str:
    text = f"{100 * mean.mean:.1f} [{100 * mean.low:.1f}, {100 * mean.high:.1f}]"
    if difference is None:
        return text
    star = "*" if difference.low > 0 or difference.high < 0 else ""
    return f"{text}; {100 * difference.mean:+.1f}{star} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _answer(values: Mapping[str, float]) -> float:
    return values.get("open_recall", values.get("closed_accuracy_strict", np.nan))


def _silent(done: int, total: int) -> None:
    pass


if __name__ == "__main__":
    main()
