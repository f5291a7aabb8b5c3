import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from a3tune.commands.evaluate import Progress
from a3tune.config import RunConfig
from a3tune.data.phantom.dataset import MARK_TESTS
from a3tune.demo import run as demo
from a3tune.demo.plan import Demo, plan_demo
from a3tune.demo.run import SUMMARY_METRICS, run_demo
from a3tune.errors import ConfigError, RunError

METHODS = ["base", "lora", "a3tune", "a3tune_truth"]


@contextmanager
def bar(title: str) -> Iterator[Progress]:
    yield lambda done, total: None


def run(plan: Demo) -> list[str]:
    said: list[str] = []
    run_demo(plan, said.append, bar)
    return said


def done_now(said: list[str], plan: Demo) -> set[str]:
    """Names of the stages that were not taken from an earlier run."""
    stages = dict(line.split(": ", 1) for line in said if line.split(": ")[0] in plan.stages())
    assert set(stages) == set(plan.stages())
    return {name for name, what in stages.items() if "done earlier" not in what}


@pytest.fixture(scope="module")
def tiny(vlm_folder: Path, ranker_folder: Path) -> list[str]:
    return [
        "patients.train=2",
        "patients.validation=1",
        "patients.test=5",
        "training.max_steps=2",
        "training.batch_size=4",
        "evaluation.max_new_tokens=3",
        f"model.path={vlm_folder}",
        f"labels.ranker={ranker_folder}",
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> tuple[Demo, list[str]]:
    plan = plan_demo(tmp_path_factory.mktemp("runs") / "demo", tiny)
    return plan, run(plan)


def test_the_summary_has_the_published_form(finished):
    plan, _ = finished
    found = json.loads((plan.folder / "summary.json").read_text())
    assert set(found) == {"methods", "labels", "seconds"}
    assert list(found["methods"]) == METHODS
    for name, scores in found["methods"].items():
        tests = scores.pop("tests")
        assert set(scores) == set(SUMMARY_METRICS)
        assert list(tests) == list(MARK_TESTS)
        for score in (*scores.values(), *tests.values()):
            assert score["ci95"][0] <= score["mean"] <= score["ci95"][1]
        paired = [score["paired_vs_lora"] for score in tests.values() if "paired_vs_lora" in score]
        assert len(paired) == (0 if name == "lora" else len(MARK_TESTS))
        assert all(score["ci95"][0] <= score["difference"] <= score["ci95"][1] for score in paired)
    assert set(found["labels"]) == {"recall_at_k", "mean_best_iou"}
    assert set(found["seconds"]) == set(plan.stages())


def test_it_says_first_what_it_will_do_and_how_long_it_takes(finished):
    plan, said = finished
    assert all(stage in said[1] for stage in plan.stages())
    assert "min" in said[2]
    assert any(line.startswith("Without the image") for line in said)
    assert any(line.startswith("Weak labels") for line in said)
    assert done_now(said, plan) == set(plan.stages())


def test_the_report_shows_the_four_methods(finished):
    plan, _ = finished
    page = (plan.folder / "report.html").read_text()
    assert all(title in page for title in demo.TITLES.values())


def test_methods_differ_in_what_they_are_and_in_nothing_else():
    plan = plan_demo(Path("demo"))
    base, lora, weak, truth = plan.configs.values()
    assert list(plan.configs) == METHODS
    assert lora.adapter.kind == "lora"
    assert [config.labels.source for config in (lora, weak, truth)] == ["none", "weak", "truth"]
    assert lora.training == weak.training == truth.training
    assert lora.data == weak.data == truth.data
    assert base.evaluation == lora.evaluation == weak.evaluation == truth.evaluation


def test_a_finished_demo_does_nothing_again_and_keeps_its_numbers(finished):
    plan, _ = finished
    before = json.loads((plan.folder / "summary.json").read_text())
    assert done_now(run(plan), plan) == set()
    after = json.loads((plan.folder / "summary.json").read_text())
    assert after["methods"] == before["methods"]
    assert after["seconds"] == pytest.approx(before["seconds"], abs=0.06)


def test_changed_settings_run_again_just_what_depends_on_them(finished, tiny):
    plan, _ = finished
    changed = plan_demo(plan.folder, [*tiny, "alignment.rows=answer"])
    # Attention of all methods is measured over the rows and heads that are aligned.
    assert done_now(run(changed), changed) == {
        "evaluate_base",
        "evaluate_lora",
        "train_a3tune",
        "evaluate_a3tune",
        "train_a3tune_truth",
        "evaluate_a3tune_truth",
        "report",
    }
    files = [config.output / "evaluation.yaml" for config in changed.configs.values()]
    assert {yaml.safe_load(file.read_text())["evaluation"]["rows"] for file in files} == {"answer"}


def test_what_answers_rest_on_is_measured_anew_with_other_settings(finished, tiny, tmp_path: Path):
    own = [*tiny, "evaluation.occlude=true", "evaluation.fillings=mean"]
    shutil.copytree(finished[0].folder, tmp_path / "demo")
    first = plan_demo(tmp_path / "demo", own)
    run(first)
    assert done_now(run(first), first) == set()
    changed = plan_demo(tmp_path / "demo", [*own, "evaluation.dilation=0.1"])
    evaluations = {f"evaluate_{name}" for name in METHODS}
    assert done_now(run(changed), changed) == {*evaluations, "report"}
    without = plan_demo(tmp_path / "demo", [*tiny, "evaluation.max_new_tokens=2"])
    assert done_now(run(without), without) == {*evaluations, "report"}
    assert not list((tmp_path / "demo").glob("*/reliance.jsonl"))


@pytest.mark.parametrize("setting", ["data.train=mine.jsonl", "output=mine", "labels.source=none", "adapter.kind=lora"])
def test_what_the_demo_sets_itself_is_not_given(setting: str):
    with pytest.raises(ConfigError, match="the demo sets this itself"):
        plan_demo(Path("demo"), [setting])


def test_a_setting_that_is_given_holds_for_all_methods():
    plan = plan_demo(Path("demo"), ["alignment.weight=0.5"])
    assert {config.alignment.weight for config in plan.configs.values()} == {0.5}


def test_an_interrupted_demo_goes_on(finished, tiny, monkeypatch: pytest.MonkeyPatch):
    plan, _ = finished
    changed = plan_demo(plan.folder, [*tiny, "evaluation.max_new_tokens=2"])
    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(changed)
    assert done_now(run(changed), changed) == {"report"}


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, tiny):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not ours"):
        run(plan_demo(tmp_path, tiny))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def cheap(finished, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], set[str]]:
    """Runs the finished demo elsewhere with another `model.path`, in which nothing is trained or answered: the stages
    that were done now."""
    plan, _ = finished
    shutil.copytree(plan.folder, tmp_path / "demo")

    def train(config: RunConfig, progress: Progress, *, synthetic: bool) -> None:
        config.output.mkdir(exist_ok=True)

    def evaluate(config: RunConfig, adapter: Path | None, progress: Progress) -> None:
        shutil.copytree(plan.folder / config.output.name, config.output, dirs_exist_ok=True)

    monkeypatch.setattr(demo, "fine_tune", train)
    monkeypatch.setattr(demo, "evaluate_run", evaluate)
    monkeypatch.setattr(demo, "write_report", lambda runs, out, *more: out.touch())

    def again(model: str) -> set[str]:
        own = plan_demo(tmp_path / "demo", [*tiny, f"model.path={model}"])
        return done_now(run(own), own)

    return again


def test_models_in_folders_are_told_apart_by_their_files(cheap, vlm_folder: Path, tmp_path: Path):
    model = shutil.copytree(vlm_folder, tmp_path / "model")
    built_on_it = {
        *(f"train_{name}" for name in METHODS[1:]),
        *(f"evaluate_{name}" for name in METHODS),
        "report",
    }
    assert cheap(str(model)) == built_on_it
    assert cheap(str(model)) == set()
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert cheap(str(model)) == built_on_it


def test_models_of_the_hub_are_told_apart_by_their_names(cheap):
    assert "train_lora" in cheap("owner/model")
    assert cheap("owner/model") == set()
    assert "train_lora" in cheap("owner/other")
