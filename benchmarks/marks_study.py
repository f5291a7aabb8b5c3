"""Where answers should hang on where the model looks: scans with a mark that gives the answer away, and clean ones.

    python benchmarks/marks_study.py --out runs/marks --rows LoRA "A3Tune" --seeds 0 1 2
    python benchmarks/marks_study.py --out runs/marks --rows LoRA "A3Tune" --seeds 0 1 2 --split test

A cell is a row (what is trained), a seed and a set. In the marked sets a mark names the right answer in a share of the
training scans; other patients' scans are answered where it names another (disagree), any (random) or the right one
(agree), and without a mark (none). Settings are chosen on the validation patients; the test patients are asked once, at
the end. Resumable cell by cell: `cells.jsonl` holds every question's score, and `study.md` is written from it. Says
before it starts what the plan will cost.
"""

import argparse
import json
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from marks_tables import BASE, tables
from measure import about, listed
from sinks import air
from towers import kept

from a3tune.commands.label import label
from a3tune.commands.subject import Subject
from a3tune.commands.train import fine_tune
from a3tune.config import RunConfig
from a3tune.data.phantom import write_phantom
from a3tune.data.phantom.dataset import MARK_TESTS
from a3tune.data.phantom.questions import ORGAN_TYPES
from a3tune.data.rows import read_rows, read_split, write_rows
from a3tune.demo.plan import read_recipe, shipped_settings
from a3tune.evaluation.evaluate import evaluate
from a3tune.evaluation.results import scores
from a3tune.metrics.catalogue import right
from a3tune.report.gather import stored_quality
from a3tune.run.folder import RunFolder
from a3tune.types import Sample
from a3tune.vlm.load import Vlm


@dataclass(frozen=True)
class Data:
    """Scans and questions."""

    marks: float | None
    """Share of the training scans whose mark names the answer; None: no marks."""
    questions: int = 800
    """To learn from, about. The fewer are among the more; validation and test are the same."""
    types: Sequence[str] = tuple(read_recipe().questions)

    @property
    def patients(self) -> dict[str, int]:
        """By split."""
        marked = self.marks is not None
        train = round(self.questions * (405 if marked else 130) / 800)
        return {"train": train} | ({"validation": 150, "test": 200} if marked else {"validation": 50, "test": 80})


SETS = {
    "marks": Data(1.0),
    "marks .95": Data(0.95),
    "marks .8": Data(0.8),
    "all types": Data(1.0, types=ORGAN_TYPES),
    "clean": Data(None),
    **{
        f"{name} {questions}": Data(share, questions)
        for name, share in (("marks", 1.0), ("clean", None))
        for questions in (200, 400, 1600, 3200)
    },
}
"""By name; a number behind the name is that of the questions to learn from."""
SETTINGS = [
    "training.epochs=8",
    "training.learning_rate=1e-3",
    "alignment.weight=3",
    "alignment.until=0.5",
    "alignment.heads=0.5",
    "alignment.rows=after_image",
]
"""In place of the demo's; whole, since cells that were measured before are known by them."""
REFERENCE = "LoRA"
"""What is compared with unless told."""
LORA = ["adapter.kind=lora"]
UNALIGNED = ["labels.source=none"]
CONSTANT = ["alignment.until=null"]
TRUTH = ["labels.source=truth", "alignment.weight=12"]
"""One region pulls a quarter as hard as the four labels of K = 4: Eq. 10 is summed over segments."""
TRUTH_AS_LABELS = ["labels.source=truth"]
EQUAL = ["adapter.expert_rank=16", "adapter.expert_alpha=64"]
"""Experts of LoRA's rank, at four times its scale: gates begin at 1/4."""
ROWS = {
    BASE: [],
    REFERENCE: [*LORA, *UNALIGNED],
    "LoRA, dropout .1": [*LORA, *UNALIGNED, "adapter.dropout=0.1"],
    **{
        f"{row}, {epochs} epoch{'s' * (epochs > 1)}": [*own, f"training.epochs={epochs}"]
        for row, own in ((REFERENCE, [*LORA, *UNALIGNED]), ("A3Tune", []))
        for epochs in (1, 2, 3, 4, 6)
    },
    "A3Tune": [],
    "A3Tune, true regions": TRUTH,
    "A3Tune, true regions, lambda 3": TRUTH_AS_LABELS,
    "A3Tune, others' regions": TRUTH,
    "A3Tune, air": TRUTH,
    "constant lambda": CONSTANT,
    "constant lambda, true regions": [*TRUTH, *CONSTANT],
    "constant lambda 3, true regions": [*TRUTH_AS_LABELS, *CONSTANT],
    "no alignment": UNALIGNED,
    "no Q-MoE": ["adapter.query_experts=0"],
    "no K-MoE": ["adapter.key_experts=0"],
    "no A3MoE": LORA,
    "no A3MoE, true regions": [*LORA, *TRUTH],
    "no A3MoE, constant lambda 3, true regions": [*LORA, *TRUTH_AS_LABELS, *CONSTANT],
    "equal capacity": EQUAL,
    "equal capacity, no alignment": [*EQUAL, *UNALIGNED],
    "equal capacity, learning rate 3e-4": [*EQUAL, "training.learning_rate=3e-4"],
    "rank 16, scale 2": ["adapter.expert_rank=16", "adapter.expert_alpha=32"],
    "rank 16, scale 1": ["adapter.expert_rank=16", "adapter.expert_alpha=16"],
    "rank 4, scale 4": ["adapter.expert_alpha=16"],
    **{f"R {heads}": [f"alignment.heads={heads}"] for heads in (0.125, 0.25, 0.75)},
    "all heads": ["alignment.heads=100%"],
    **{f"lambda {weight}": [f"alignment.weight={weight}"] for weight in (0.1, 0.3, 1, 10)},
    **{f"constant lambda {weight}": [f"alignment.weight={weight}", *CONSTANT] for weight in (0.3, 1)},
    **{f"K {count}": [f"labels.top_k={count}"] for count in (1, 2, 8)},
    **{f"until {share}": [f"alignment.until={share}"] for share in (0.25, 1)},
    "answer rows": ["alignment.rows=answer"],
    "load balance .1": ["training.load_balance=0.1"],
    "constant lambda, load balance .1": ["training.load_balance=0.1", *CONSTANT],
    "constant lambda 3, load balance .1, true regions": ["training.load_balance=0.1", *TRUTH_AS_LABELS, *CONSTANT],
    "learning rate 3e-3": ["training.learning_rate=3e-3"],
    **{
        f"{row}, {method}": [*own, f"evaluation.decode={method}"]
        for row, own in ((REFERENCE, [*LORA, *UNALIGNED]), ("A3Tune", []))
        for method in ("vcd", "dola", "opera", "avisc", "m3id", "damro", "pai", "controlmllm")
    },
}
"""What is trained, or how it answers, and what differs from A3Tune with weak labels."""


def elsewhere(samples: Sequence[Sample]) -> list[Sample]:
    """Each with the region of another organ: that of a question about another patient's same part of the body.

    Ends the program where there are too few patients for that, as with `--quick`.
    """
    rng = np.random.default_rng(0)
    moved = []
    for sample in samples:
        others = [
            other
            for other in samples
            if other.meta["body"] == sample.meta["body"]
            and other.meta["patient"] != sample.meta["patient"]
            and other.meta["organ"] != sample.meta["organ"]
        ]
        if not others:
            raise SystemExit(
                f"no other patient's {sample.meta['body']} to take a region from: more patients are needed"
            )
        moved.append(replace(sample, regions=others[rng.integers(len(others))].regions))
    return moved


MISLED: Mapping[str, Callable[[Sequence[Sample]], Sequence[Sample]]] = {
    "A3Tune, others' regions": elsewhere,
    "A3Tune, air": lambda samples: [replace(sample, regions=(air(),)) for sample in samples],
}
"""Rows that are pulled onto wrong regions, and how these are made: is it the place that helps, or the pulling?"""
QUICK = ["training.max_steps=2", "training.epochs=1", "evaluation.max_new_tokens=3"]
FIRST_GUESS = 150.0
"""Seconds of processor time that a cell is taken to need before any was measured."""


@dataclass(frozen=True)
class Cell:
    """One training (or the base), and what it answers."""

    set: str
    row: str
    seed: int
    split: str

    @property
    def name(self) -> str:
        """Of its training, which rows that only answer in another way share."""
        trained = [change for change in ROWS[self.row] if not change.startswith("evaluation.")]
        shared = [row for row, own in ROWS.items() if row not in (BASE, *MISLED) and own == trained]
        row = self.row if self.row in (BASE, *MISLED) else shared[0]
        return f"{self.set} {row} {self.seed}".replace(" ", "_")


@dataclass(frozen=True)
class Study:
    """Where things are, and what the settings are."""

    out: Path
    overrides: Sequence[str]
    quick: bool

    def data(self, name: str) -> Path:
        return self.out / "data" / name.replace(" ", "_")

    def patients(self, name: str) -> dict[str, int]:
        """Of a set, by split."""
        patients = SETS[name].patients
        return dict.fromkeys(patients, 6) if self.quick else patients

    def tests(self, cell: Cell) -> dict[str, list[Sample]]:
        """Questions of a cell by the name of their test."""
        samples = read_rows(self.data(cell.set) / f"{cell.split}.jsonl")
        tests = MARK_TESTS if SETS[cell.set].marks is not None else ("clean",)
        return {test: [one for one in samples if one.meta.get("test", test) == test] for test in tests}

    def settings(self, cell: Cell) -> list[str]:
        """Overrides of the demo's settings."""
        return [*SETTINGS, *self.overrides, *ROWS[cell.row]]

    def known_by(self, cell: Cell) -> list[str]:
        """What a cell must have been measured with."""
        counts = [f"patients.{split}={count}" for split, count in self.patients(cell.set).items()]
        return [*SETS[cell.set].types, *counts, *self.settings(cell)]

    def train(self, name: str, row: str) -> Path:
        """Questions that a row of a set learns from."""
        return self.data(name) / (f"train, {row}.jsonl" if row in MISLED else "train.jsonl")

    def config(self, cell: Cell) -> RunConfig:
        config = shipped_settings([*self.settings(cell), f"training.seed={cell.seed}"])
        data = replace(config.data, train=self.train(cell.set, cell.row), validation=None, test=None)
        labels = replace(config.labels, store=self.out / "labels")
        return replace(config, data=data, labels=labels, output=self.out / "runs" / cell.name)

    def prepare(self, name: str, rows: Sequence[str]) -> None:
        """Data of a set and, if one of its rows learns from them, weak labels, once."""
        folder, patients = self.data(name), self.patients(name)
        if not all((folder / f"{split}.jsonl").is_file() for split in patients):
            write_phantom(folder, patients, marks=SETS[name].marks, types=SETS[name].types)
        for row in {*rows} & {*MISLED}:
            write_rows(self.train(name, row), MISLED[row](read_rows(folder / "train.jsonl")))
        config = self.config(Cell(name, "A3Tune", 0, "validation"))
        if any(row != BASE and not {*UNALIGNED, "labels.source=truth"} & {*ROWS[row]} for row in rows):
            label(config, _silent)


def work(study: Study, cell: Cell) -> dict[str, Any]:
    """Train and answer; a line of `cells.jsonl`."""
    start, config = _processor_seconds(), study.config(cell)
    # DAMRO looks into the tower, of which only the answers are kept.
    with nullcontext() if config.evaluation.decode == "damro" else kept():
        adapter = None if cell.row == BASE else RunFolder(fine_tune(config, _silent)).adapter
        trained = _processor_seconds()
        vlm = Subject(config, adapter).load()
        questions = study.tests(cell)
        tests = {name: _answer(vlm, samples, config) for name, samples in questions.items() if name != "random"}
    if "random" in questions:
        tests["random"] = _at_random(tests, questions["random"])
    seconds = {"train": trained - start, "answer": _processor_seconds() - trained}
    about = asdict(cell) | {"settings": study.known_by(cell)}
    return about | {"seconds": {name: round(value, 1) for name, value in seconds.items()}, "tests": tests}


def measured(study: Study, cells: Sequence[Cell], jobs: int) -> Iterator[dict[str, Any]]:
    """`work` on each cell, as they end; with one job at a time all happens in this process."""
    if jobs == 1:
        torch.set_num_threads(1)
        yield from (work(study, cell) for cell in cells)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from (done.result() for done in as_completed([pool.submit(work, study, cell) for cell in cells]))


def earlier(study: Study, file: Path) -> list[dict[str, Any]]:
    """Cells that were measured before; ends the program if their settings were others."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    for line in lines:
        now = study.known_by(_cell(line))
        if line["settings"] != now:
            raise SystemExit(
                f"{file}: {line['row']}: was measured with {line['settings']}, not {now}; use another --out"
            )
    return lines


def _cell(line: Mapping[str, Any]) -> Cell:
    return Cell(line["set"], line["row"], line["seed"], line["split"])


def _answer(vlm: Vlm, samples: Sequence[Sample], config: RunConfig) -> dict[str, list[float | None]]:
    """Of every question: whether it is answered right, and the attention inside its region."""
    given = evaluate(vlm, samples, config.active_evaluation).predictions
    mass = [scores(prediction).get("attention_mass") for prediction in given]
    return {
        "right": [None if (share := right(prediction)) is None else round(share, 4) for prediction in given],
        "mass": [None if share is None else round(share, 4) for share in mass],
    }


def _at_random(
    tests: Mapping[str, Mapping[str, list[float | None]]], samples: Sequence[Sample]
) -> dict[str, list[float | None]]:
    """Scores where the mark names any answer: each of its pictures is one of the two other tests'."""
    source = ["agree" if sample.meta["mark_agrees"] == "yes" else "disagree" for sample in samples]
    return {score: [tests[test][score][row] for row, test in enumerate(source)] for score in ("right", "mass")}


def markdown(study: Study, lines: Sequence[Mapping[str, Any]], split: str, against: str) -> str:
    """All tables of a split."""
    parts = listed(about())
    for name in SETS:
        cells = [line for line in lines if (line["set"], line["split"]) == (name, split)]
        scored = {row: {line["seed"]: line["tests"] for line in cells if line["row"] == row} for row in ROWS}
        if cells:
            parts += ["", f"## {name}: {split} patients", "", *_labels(study, name)]
            train = read_rows(study.data(name) / "train.jsonl")
            tests = study.tests(Cell(name, REFERENCE, 0, split))
            parts += tables(train, tests, {row: seeds for row, seeds in scored.items() if seeds}, against)
    return "\n".join(parts) + "\n"


def _labels(study: Study, name: str) -> Iterator[str]:
    config = study.config(Cell(name, "A3Tune", 0, "validation"))
    quality = stored_quality(config, read_split(config.data, "train"))
    if quality is not None:
        share = 100 * quality.overall.recall_at_k
        yield f"Weak labels: the true region is among the best {quality.top_k} for {share:.1f} % of the questions."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["marks"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[REFERENCE, "A3Tune"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--against", choices=ROWS, default=REFERENCE, help="row that the others are compared with")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one thread each")
    parser.add_argument("--plan", action="store_true", help="say what it would cost, and do nothing")
    parser.add_argument("--quick", action="store_true", help="few patients and two steps, to see that it works")
    parser.add_argument("overrides", nargs="*", help="settings of all rows, before the options: key=value")
    args = parser.parse_args()
    study = Study(args.out, [*(QUICK if args.quick else []), *args.overrides], args.quick)
    file = args.out / "cells.jsonl"
    lines = earlier(study, file)
    done = {_cell(line) for line in lines}
    cells = [Cell(name, row, seed, args.split) for name in args.sets for seed in args.seeds for row in args.rows]
    cells = [cell for cell in dict.fromkeys(cells) if cell not in done and (cell.row != BASE or cell.seed == 0)]
    seconds = [sum(line["seconds"].values()) for line in lines] or [FIRST_GUESS]
    print(f"{len(cells)} cells of about {np.mean(seconds):.0f} s of processor time each", end=": ")
    print(f"{len(cells) * np.mean(seconds) / 60:.0f} min, beside data and labels", flush=True)
    if args.plan:
        return
    for name in dict.fromkeys(cell.set for cell in cells):
        study.prepare(name, args.rows)
    for number, line in enumerate(measured(study, cells, args.jobs), start=1):
        lines.append(line)
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        means = {test: round(float(np.nanmean(own["right"])), 3) for test, own in line["tests"].items()}
        print(f"{number} of {len(cells)}: {_cell(line).name}: {means}; seconds {line['seconds']}", flush=True)
    page = markdown(study, lines, args.split, args.against)
    (args.out / "study.md").write_text(page, encoding="utf-8")
    print(page)


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _silent(done: int, total: int) -> None:
    pass


if __name__ == "__main__":
    main()
