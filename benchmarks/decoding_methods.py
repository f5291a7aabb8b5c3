"""Every decoding method on the base model, LoRA and A3Tune, over training seeds: answers, hallucination, cost.

    python benchmarks/demo_seeds.py --out runs/demo_seeds --seeds 0 1 2 --ablation-seeds
    python benchmarks/decoding_methods.py --runs runs/demo_seeds --seeds 0 1 2

Takes the adapters and the test set of `demo_seeds.py`; of the questions about a region every third, so that twelve
methods on seven models take an hour on two cores. Settings are the published ones (docs/decoding.md), nothing is chosen
on the test set. A difference is a method minus greedy decoding of the same model, question by question; intervals
resample seeds and patients, tests are adjusted over all comparisons of a model (Holm). Resumable. Writes
`decoding_methods.json` and `.md` into the folder of the runs.
"""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from measure import CLEAN

from a3tune.commands.evaluate import by_difference, evaluate_all
from a3tune.commands.subject import Subject
from a3tune.data.phantom.questions import GENERIC_TYPES
from a3tune.data.rows import read_rows, write_rows
from a3tune.decoding import DECODERS
from a3tune.demo.plan import plan_demo
from a3tune.evaluation.predictions import Cost, read_cost, read_predictions
from a3tune.evaluation.results import clusters, scores
from a3tune.metrics.stats import Estimate, holm, paired_difference, paired_permutation_test, seeds_interval
from a3tune.run.folder import RunFolder
from a3tune.types import Sample

REFERENCE = "greedy"
MODELS = ("base", "lora", "a3tune")
METRICS = {
    "open_recall": "Open recall",
    "closed_accuracy_strict": "Closed accuracy",
    "hallucination": '"Yes" to a no',
    "attention_mass": "Attention mass",
}
LEVEL = 0.05


@dataclass(frozen=True)
class Row:
    """One method on one model."""

    model: str
    method: str
    seeds: int
    means: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    """From greedy decoding of the same model."""
    p: Mapping[str, float]
    """Of the differences, adjusted over all methods and metrics of the model."""
    passes: float
    """Forward passes of the language model, relative to greedy: median over seeds."""
    seconds: float
    """Of answering, likewise."""


def localised(samples: Sequence[Sample], every: int) -> list[Sample]:
    """Every `every`-th question about a region that is known."""
    chosen = [sample for sample in samples if sample.meta["question_type"] not in GENERIC_TYPES and sample.regions]
    return chosen[::every]


def answer(runs: Path, out: Path, data: Path, seeds: Sequence[int], quick: bool) -> dict[str, dict[int, Path]]:
    """Answers of every model and seed by all methods; returns the folders of the models, one of each method inside."""
    demo = plan_demo(runs, [*CLEAN, *(["evaluation.max_new_tokens=4"] if quick else [])])
    folders: dict[str, dict[int, Path]] = {}
    for model in MODELS:
        for seed in seeds[:1] if model == "base" else seeds:
            name = f"{model}_{seed}"
            config = demo.configs[model]
            config = replace(config, data=replace(config.data, test=data))
            adapter = None if model == "base" else runs / name / "adapter"
            subject = {name: Subject(config, adapter)}
            place = by_difference(out / name, subject, list(DECODERS))
            done = evaluate_all(subject, list(DECODERS), place, lambda done, total: None)
            without = done.absent | done.failed
            print(f"{name}: done", *(f"({method}: {why})" for method, why in without.items()), flush=True)
            folders.setdefault(model, {})[seed] = out / name
    return folders


def rows_of(model: str, folders: Mapping[int, Path], samples: Sequence[Sample]) -> list[Row]:
    groups = clusters(samples)
    methods = sorted(path.name for path in next(iter(folders.values())).iterdir() if path.is_dir())
    methods.sort(key=lambda name: name != REFERENCE)
    tables = {name: [_scores(folder / name, samples) for folder in folders.values()] for name in methods}
    costs = {name: [read_cost(RunFolder.open(folder / name)) for folder in folders.values()] for name in methods}
    tested: dict[tuple[str, str], float] = {}
    differences: dict[str, dict[str, Estimate]] = {name: {} for name in methods}
    for name in methods[1:]:
        for metric in METRICS:
            own, other = (np.stack([table[metric] for table in tables[which]]) for which in (name, REFERENCE))
            differences[name][metric] = paired_difference(own, other, groups)
            tested[name, metric] = paired_permutation_test(own.mean(0), other.mean(0), groups)
    adjusted = dict(zip(tested, holm(list(tested.values())).tolist(), strict=True))
    return [
        Row(
            model=model,
            method=name,
            seeds=len(folders),
            means={
                metric: seeds_interval(np.stack([table[metric] for table in tables[name]]), groups)
                for metric in METRICS
            },
            differences=differences[name],
            p={metric: adjusted[name, metric] for metric in METRICS if (name, metric) in adjusted},
            passes=_relative(costs[name], costs[REFERENCE], "passes"),
            seconds=_relative(costs[name], costs[REFERENCE], "answer_seconds"),
        )
        for name in methods
    ]


def markdown(rows: Sequence[Row], about: Mapping[str, object]) -> str:
    """A table for each model; a star marks a difference from greedy whose interval and adjusted test both hold."""
    lines = [f"- {name}: {value}" for name, value in about.items()]
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        lines += ["", f"### {model}, {own[0].seeds} seed{'s' if own[0].seeds > 1 else ''}", ""]
        lines += ["| Method | " + " | ".join(METRICS.values()) + " | Passes | Seconds |"]
        lines += ["|---" * (len(METRICS) + 3) + "|"]
        for row in own:
            cells = [_cell(row, metric) for metric in METRICS]
            lines.append(f"| {row.method} | " + " | ".join(cells) + f" | {row.passes:.2f}x | {row.seconds:.2f}x |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="of demo_seeds.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="few questions and short answers, to see that it works")
    args = parser.parse_args()
    out = args.runs / "decoding"
    out.mkdir(exist_ok=True)
    data = args.runs / "data" / "localised.jsonl"
    write_rows(data, localised(read_rows(args.runs / "data" / "test.jsonl"), 30 if args.quick else 3))
    samples = read_rows(data)
    folders = answer(args.runs, out, data, args.seeds, args.quick)
    rows = [row for model, own in folders.items() for row in rows_of(model, own, samples)]
    about = {
        "questions": f"{len(samples)} about a region, of {len(set(clusters(samples)))} patients",
        "training seeds": " ".join(map(str, args.seeds)),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s)",
        "command": f"python benchmarks/decoding_methods.py --runs RUNS --seeds {' '.join(map(str, args.seeds))}",
    }
    text = markdown(rows, about)
    found = {"about": about, "rows": [asdict(row) for row in rows]}
    (args.runs / "decoding_methods.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (args.runs / "decoding_methods.md").write_text(text, encoding="utf-8")
    print(text)


def _scores(folder: Path, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Every metric for every question, NaN where it is not defined."""
    by_id = {prediction.id: scores(prediction) for prediction in read_predictions(RunFolder.open(folder))}
    return {metric: np.array([by_id[sample.id].get(metric, np.nan) for sample in samples]) for metric in METRICS}


def _relative(costs: Sequence[Cost], reference: Sequence[Cost], name: str) -> float:
    return float(np.median([getattr(a, name) / getattr(b, name) for a, b in zip(costs, reference, strict=True)]))


def _cell(row: Row, metric: str) -> str:
    mean, difference = row.means[metric], row.differences.get(metric)
    text = f"{100 * mean.mean:.1f} [{100 * mean.low:.1f}, {100 * mean.high:.1f}]"
    if difference is None:
        return text
    apart = (difference.low > 0 or difference.high < 0) and row.p[metric] < LEVEL
    return f"{text}; {100 * difference.mean:+.1f}{'&ast;' if apart else ''}"


if __name__ == "__main__":
    main()
