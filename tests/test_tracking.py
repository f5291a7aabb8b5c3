"""Trackers: what reaches them, and that one that fails stops no training."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from a3tune.config import AlignmentConfig, RunConfig, load_config
from a3tune.errors import ConfigError, RunError
from a3tune.training.tracking import TRACKERS, check_trackers, flat
from a3tune.training.train import train
from trainings import At, config_of, metrics, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def tracked(base: Path, output: Path, *names: str) -> RunConfig:
    config = config_of(base, output, eval_steps=2, eval_samples=3, report_to=names)
    return replace(
        config,
        data=replace(config.data, validation=base / "train.jsonl"),
        alignment=AlignmentConfig(heads=2, head_selection="running"),
        evaluation=replace(config.evaluation, max_new_tokens=4),
    )


def events(folder: Path) -> Any:
    pytest.importorskip("tensorboard", reason="needs the extra track")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), {"images": 0, "scalars": 0}).Reload()


def test_tensorboard_shows_the_log_and_pictures(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra track")
    folder = train(tracked(base, tmp_path / "run", "tensorboard"), callbacks=())
    found = events(folder / "tensorboard")
    scalars = set(found.Tags()["scalars"])
    wanted = {"train/loss_align", "train/attention_inside", "train/key_use/1", "train/heads_selected/2"}
    assert wanted | {"eval/loss_llm", "eval/coverage", "eval/open_recall"} <= scalars
    logged = {line["step"]: line["loss_align"] for line in metrics(folder) if "loss_align" in line}
    shown = {event.step: event.value for event in found.Scalars("train/loss_align")}
    assert shown == pytest.approx(logged)
    assert found.Tags()["images"] == ["eval/case 1", "eval/case 2", "eval/case 3"]
    pictures = found.Images("eval/case 1")
    assert [(one.step, one.width, one.height) for one in pictures] == [(2, 48, 48), (4, 48, 48)]
    texts = [str(event) for tag in found.Tags()["tensors"] for event in found.Tensors(tag)]
    assert not any(f"s{number}.png" in text for text in [*scalars, *texts] for number in range(6))
    assert not (folder / "checkpoints" / "runs").exists()


def test_a_run_that_goes_on_is_one_run_there(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra track")
    config = tracked(base, tmp_path / "run", "tensorboard")

    def die() -> None:
        raise KeyError("killed")

    with pytest.raises(KeyError):
        train(config, callbacks=[At(4, die)])
    folder = train(config, callbacks=())
    assert [event.step for event in events(folder / "tensorboard").Scalars("train/loss")] == [1, 2, 3, 4]


def test_a_line_is_plain_numbers() -> None:
    line = {"loss": 1.0, "key_use": [0.25, 0.75], "heads_selected": ["0110", "0001"]}
    assert flat(line) == {
        "loss": 1.0,
        "key_use/1": 0.25,
        "key_use/2": 0.75,
        "heads_selected/1": 2,
        "heads_selected/2": 1,
    }


def test_the_names_are_those_of_transformers() -> None:
    assert TRACKERS.keys() == integration_utils.INTEGRATION_TO_CALLBACK.keys()


@pytest.mark.parametrize(("name", "told"), [("tensorbord", "did you mean tensorboard"), ("neptune", "pip install nep")])
def test_a_tracker_that_cannot_be_had_is_told(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_trackers([name])


class Home(TrainerCallback):
    """Stands for a tracker whose server may be gone."""

    fails = ""
    told: list[dict[str, Any]]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        type(self).told = []
        if self.fails == "begin":
            raise ValueError("no key given,\nlog in")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.fails == "log":
            raise ConnectionError("no route to host")
        type(self).told.append(logs)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> type[Home]:
    kind = type("Mine", (Home,), {})
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "kubeflow", kind)  # needs no package
    return kind


def test_a_tracker_that_does_not_start_is_told(base: Path, tmp_path: Path, home: Any) -> None:
    home.fails = "begin"
    with pytest.raises(RunError, match="report_to: kubeflow does not start: no key given, log in"):
        train(tracked(base, tmp_path / "run", "kubeflow"), callbacks=())


def test_a_tracker_that_fails_later_stops_nothing(
    base: Path, tmp_path: Path, home: Any, caplog: pytest.LogCaptureFixture
) -> None:
    home.fails = "log"
    with caplog.at_level(logging.WARNING):
        folder = train(tracked(base, tmp_path / "run", "kubeflow"), callbacks=())
    assert (folder / "adapter").is_dir()
    assert caplog.text.count("kubeflow: fails (no route to host)") == 1


def test_names_as_text_and_as_a_list(tmp_path: Path) -> None:
    assert load_config(None, ["training.report_to=tensorboard, wandb"]).training.report_to == ("tensorboard", "wandb")
    (tmp_path / "run.yaml").write_text("training: {report_to: [mlflow]}")
    assert load_config(tmp_path / "run.yaml").training.report_to == ("mlflow",)
    assert load_config(None, ["training.report_to=none"]).training.report_to == ()
    with pytest.raises(ConfigError, match="expected names with commas"):
        load_config(None, ["training.report_to=3"])
