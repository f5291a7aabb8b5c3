"""What a dry run says of a training, beside what the training takes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from typer.testing import CliRunner

from a3tune.cli import app
from a3tune.config import RunConfig, load_config
from a3tune.data.rows import read_split
from a3tune.labels.truth import truth_labels
from a3tune.training.estimate import Alive, estimate_memory, steps_of
from a3tune.training.train import train
from trainings import config_of, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


class Measured(TrainerCallback):
    """The most that is alive within the steps, besides the model."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.alive = Alive()
        self.alive.__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.alive.__exit__(None, None, None)
        self.steps = state.max_steps
        self.model = sum(weight.nbytes for weight in kwargs["model"].parameters())


def measured(config: RunConfig) -> Measured:
    found = Measured()
    train(config, callbacks=[found])
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": {"kind": "lora"}, "training": {"batch_size": 1}},
        {"training": {"batch_size": 3}},
        {"training": {"batch_size": 3, "activation_checkpointing": True}},
        {"training": {"batch_size": 2, "load_balance": 0.1}, "alignment": {"variant": "code"}},
    ],
    ids=str,
)
def test_memory_is_what_is_taken(settings: dict[str, dict[str, Any]], base: Path, tmp_path: Path):
    config = config_of(base, tmp_path / "run", max_steps=3)
    config = replace(config, model=replace(config.model, path="tiny"), adapter=load_config(None).adapter)
    sections = {name: replace(getattr(config, name), **changes) for name, changes in settings.items()}
    config = replace(config, **sections)
    said = estimate_memory(config, read_split(config.data, "train"), truth_labels)
    found = measured(config)
    assert said.weights + said.adapter // 3 == found.model
    assert said.total == pytest.approx(found.model + found.alive.most, rel=0.1)


@pytest.mark.parametrize(
    "training",
    [{"epochs": 2.5}, {"epochs": 1.0, "accumulation": 4}, {"epochs": 3.0, "batch_size": 4}, {"max_steps": 2}],
)
def test_steps_are_those_of_the_training(training: dict[str, Any], base: Path, tmp_path: Path):
    config = config_of(base, tmp_path / "run", **{"max_steps": None} | training)
    assert steps_of(config, 6) == measured(config).steps


def dry(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, arguments), "--dry-run"])


def test_a_dry_run_says_what_it_would_take_and_leaves_nothing(base: Path, tmp_path: Path):
    rows = [f"data.train={base / 'train.jsonl'}", f"data.validation={base / 'train.jsonl'}", f"output={tmp_path / 'r'}"]
    before = sorted(base.rglob("*"))
    said = dry(*rows, "labels.source=truth", "training.eval_steps=2", "--timed-steps", 1)
    assert said.exit_code == 0, said.output
    assert "# Rows: 6, 4 of them with regions of their own\n# Steps: 3 of 8 samples\n" in said.output
    assert "# Validation: 6 rows of" in said.output
    assert "# Memory of a device: about 0." in said.output
    assert "s a step (1 timed)" in said.output
    assert sorted(base.rglob("*")) == before and not (tmp_path / "r").exists()


def test_a_dry_run_of_a_run_that_is_there(base: Path, tmp_path: Path):
    config = config_of(base, tmp_path / "run", max_steps=1)
    train(config, callbacks=())
    same = ["--config", tmp_path / "run" / "config.yaml", f"data.train={base / 'train.jsonl'}"]
    assert "# Steps: 1 of 2 samples; it is finished" in dry(*same).output
    other = dry(*same, "training.seed=5")
    assert other.exit_code == 2 and "other settings: training.seed" in other.output


def test_a_dry_run_finds_rows_without_labels(base: Path, tmp_path: Path):
    store = tmp_path / "labels"
    first = tmp_path / "first.jsonl"
    first.write_text(
        (base / "train.jsonl").read_text().splitlines()[0].replace('"image": "', f'"image": "{base}/') + "\n"
    )
    assert CliRunner().invoke(app, ["label", str(first), "--out", str(store)]).exit_code == 0
    said = dry(f"data.train={base / 'train.jsonl'}", f"labels.store={store}", f"output={tmp_path / 'r'}")
    assert said.exit_code == 2 and "has no labels in" in said.output
    assert dry(f"data.train={first}", f"labels.store={store}", f"output={tmp_path / 'r'}").exit_code == 0


def test_a_model_that_is_not_here_is_not_asked_for(base: Path, tmp_path: Path):
    said = dry(f"data.train={base / 'train.jsonl'}", "labels.source=none", "model.path=nobody/nothing-at-all")
    assert said.exit_code == 0
    assert "nobody/nothing-at-all is not on this machine; it would be downloaded" in said.output


def test_tensors_are_counted_while_they_live():
    import torch

    with Alive() as alive:
        first = torch.zeros(1000)
        view = first[:10]
        assert alive.now == 4000
        second = first + 1
        assert alive.now == 8000
        del first, second
        assert alive.now == 4000  # the view holds it
        del view
    assert (alive.now, alive.most) == (0, 8000)
