"""Every benchmark in its `--quick` form: that it runs and leaves its numbers. No timing is asserted."""

import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from a3tune.data.rows import read_rows
from a3tune.masks import area
from a3tune.types import Region, Sample

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
MEASURED = (
    "decoding_cost",
    "decoding_ports",
    "experts",
    "growth",
    "importing",
    "labelling_cost",
    "labels",
    "newcomer",
    "proposers",
    "reading",
    "serving",
    "startup",
)
"""Each leaves `OUT.json` and `OUT.md`, and runs in this process."""
ALONE = ("dry_run", "step_cost")
"""The same, in a process of its own: it measures the memory of forked ones."""
TESTED = ("convert", "families", "gpu", "marks_study", "roofline", "sinks", "store")
"""With a test of their own below."""
ELSEWHERE = ("damage", "faults", "fuzz")
"""Run what other tests run, only more of it: test_damage.py, test_faults.py and test_fuzz_*.py."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs a benchmark with arguments as a command would."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *map(str, arguments)])
        importlib.import_module(name).main()

    yield run
    torch.set_num_threads(threads)


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def check(out: Path, command: str) -> None:
    """Numbers in the JSON file, and a table in the Markdown file; both say how they were made."""
    found = json.loads(out.with_suffix(".json").read_text())
    page = out.with_suffix(".md").read_text()
    about = found.pop("about")
    assert about["command"].startswith(command)
    assert command in page
    every = list(numbers(found))
    assert len(every) > 3
    assert all(math.isfinite(number) for number in every)
    assert max(every) > 0
    rows = [line for line in page.splitlines() if re.match(r"\|.*\d.*\|$", line)]
    assert rows
    assert "nan" not in page


def test_every_benchmark_is_run_here_or_elsewhere() -> None:
    commands = {path.stem for path in BENCHMARKS.glob("*.py") if "\ndef main()" in path.read_text()}
    assert commands == {*MEASURED, *ALONE, *TESTED, *ELSEWHERE}


@pytest.mark.parametrize("name", MEASURED)
def test_quick(name: str, run: Callable[..., None], tmp_path: Path) -> None:
    run(name, "--quick", "--out", tmp_path / name)
    check(tmp_path / name, f"python benchmarks/{name}.py --quick")


def test_quick_evaluations_that_read_ahead(run: Callable[..., None], tmp_path: Path) -> None:
    run("reading", "--ahead", "--quick", "--out", tmp_path / "ahead")
    check(tmp_path / "ahead", "python benchmarks/reading.py --ahead --quick")


@pytest.mark.parametrize("name", ALONE)
def test_quick_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    command = [f"benchmarks/{name}.py", "--quick", "--out", str(tmp_path / name)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    check(tmp_path / name, f"python {' '.join(command[:2])}")


def test_the_roofline_is_computed(run: Callable[..., None], tmp_path: Path) -> None:
    run("roofline", "--out", tmp_path / "roofline")
    check(tmp_path / "roofline", "python benchmarks/roofline.py")


def test_quick_gpu(tmp_path: Path) -> None:
    """Every section at tiny widths, on the processor; a second time nothing is done again."""
    command = ["benchmarks/gpu.py", "--quick", "--out", str(tmp_path / "gpu")]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    check(tmp_path / "gpu", "python benchmarks/gpu.py --quick")
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert not [(name, row) for name, section in sections.items() for row in section["rows"] if "failed" in row]
    resumed, same = sections["resume"]["rows"]
    assert resumed["largest difference"] == same["largest difference"] == 0
    assert sections["processes"]["rows"][0]["largest difference"] < 1e-5
    assert max(row["maps"] for row in sections["capture"]["rows"]) < 1e-3
    losses = [row["first loss"] for name in ("steps", "checkpointing") for row in sections[name]["rows"][-2:]]
    assert max(losses) - min(losses) < 0.02, "ours, the published way, and ours with checkpointing"
    subprocess.run([sys.executable, *command, "--only", "versions"], cwd=ROOT, check=True, capture_output=True)
    again = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {name: again[name] for name in again if name != "versions"} == {
        name: sections[name] for name in sections if name != "versions"
    }


def test_quick_store(run: Callable[..., None], tmp_path: Path) -> None:
    run("store", "--quick", "--out", tmp_path / "store.md")
    assert re.search(r"\|.*\d.*\|", (tmp_path / "store.md").read_text())


def test_quick_families(run: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        run("families", "--quick", "--out", tmp_path / "families.md")
    assert stop.value.code == 0
    assert "FAILS" not in (tmp_path / "families.md").read_text()


def test_quick_convert(run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("convert", "--quick", "--out", tmp_path / "work")
    assert re.search(
        r"GB of weights: \d+ s, [\d.]+ GB of memory before, [\d.]+ GB at the peak", capsys.readouterr().out
    )
    assert not (tmp_path / "work").exists()


def test_tables_of_marks_star_what_is_sure_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    tables = importlib.import_module("marks_tables").tables

    def meta(patient: int, mark: str) -> dict[str, str]:
        return {"question_type": "presence", "body": "brain", "patient": str(patient), "mark": mark}

    def asked(mark: str) -> list[Sample]:
        """Of 40 patients; the answer is the patient's parity, and `mark` says which patients' marks name it."""
        answers = ["yes" if number % 2 else "no" for number in range(40)]
        named = answers if mark == "agree" else answers[1:] + answers[:1]
        rows = enumerate(zip(answers, named, strict=True))
        return [Sample(f"{n}", Path("x.png"), "?", answer, "closed", (), meta(n, own)) for n, (answer, own) in rows]

    half, every, none = [1.0, 0.0] * 20, [1.0] * 40, [0.0] * 40
    tests = {"agree": asked("agree"), "disagree": asked("disagree")}
    scored = {
        "LoRA": {0: {test: {"right": half, "mass": half} for test in tests}},
        "other": {0: {"agree": {"right": half, "mass": half}, "disagree": {"right": every, "mass": none}}},
    }
    page = "\n".join(tables(asked("agree"), tests, scored, "LoRA"))
    assert "Right by the question only: agree 50.0, disagree 50.0." in page
    assert "Right by the mark only: agree 100.0, disagree 0.0." in page
    assert "]; +0.0 [+0.0, +0.0] | 100.0 [100.0, 100.0]; +50.0&ast; [" in page
    assert "] | 25.0 |" in page
    turned = "\n".join(tables(asked("agree"), tests, scored, "other"))
    assert "]; +0.0 [+0.0, +0.0] | 50.0 [" in turned and "]; -50.0&ast; [" in turned


def test_quick_marks_study(run: Callable[..., None], tmp_path: Path) -> None:
    plan = ["--quick", "--out", tmp_path, "--sets", "marks", "clean", "--seeds", 0]
    run("marks_study", *plan, "--rows", "base", "LoRA", "A3Tune")
    lines = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [(line["set"], line["row"]) for line in lines] == [
        (name, row) for name in ("marks", "clean") for row in ("base", "LoRA", "A3Tune")
    ]
    assert all(len(score["right"]) == len(score["mass"]) > 0 for line in lines for score in line["tests"].values())
    page = (tmp_path / "study.md").read_text()
    assert "Right by the mark only: disagree" in page and "| LoRA | 1 |" in page
    run("marks_study", *plan, "--rows", "base", "LoRA")
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == len(lines), "nothing is done again"
    run("marks_study", *plan, "--rows", "A3Tune, damro", "A3Tune, air")
    page = (tmp_path / "study.md").read_text()
    assert "| A3Tune, damro | 1 |" in page and "| A3Tune, air | 1 |" in page
    with pytest.raises(SystemExit, match="more patients are needed"):
        run("marks_study", *plan, "--rows", "A3Tune, others' regions")
    with pytest.raises(SystemExit, match="alignment"):
        run("marks_study", "alignment.weight=2", *plan, "--rows", "base", "LoRA")


def test_regions_elsewhere_are_of_another_patient_and_another_organ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    elsewhere = importlib.import_module("marks_study").elsewhere
    asked = [
        (patient, organ, body)
        for patient in "ab"
        for organ, body in (("x", "chest"), ("y", "chest"), ("z", "brain"), ("w", "brain"))
    ]
    rows = [
        Sample(
            patient + organ,
            Path("x.png"),
            "?",
            "yes",
            "closed",
            (Region(box=(0, 0, 1, 1), name=patient + organ),),
            {"patient": patient, "organ": organ, "body": body},
        )
        for patient, organ, body in asked
    ]
    taken = {row.id: row.regions[0].name for row in elsewhere(rows)}
    assert taken == {"ax": "by", "ay": "bx", "az": "bw", "aw": "bz", "bx": "ay", "by": "ax", "bz": "aw", "bw": "az"}


def test_quick_sinks_leave_a_base_that_learnt_nothing_but_where_to_look(
    run: Callable[..., None], tmp_path: Path
) -> None:
    run("sinks", "--quick", "--out", tmp_path)
    taught, asked = (read_rows(tmp_path / f"{name}.jsonl") for name in ("rows", "train"))
    truth = {sample.id: sample.answer for sample in asked}
    assert sum(truth[sample.id] != sample.answer for sample in taught) > 0, "its own answers, not the true ones"
    places = {area(region.mask) for sample in taught for region in sample.regions if region.mask}
    assert places == {2 * 12 * 12} and all(len(sample.regions) == 1 for sample in taught)
    run("marks_study", f"model.path={tmp_path / 'model'}", "--quick", "--out", tmp_path / "study", "--rows", "base")
    assert "| base | 1 |" in (tmp_path / "study" / "study.md").read_text()
