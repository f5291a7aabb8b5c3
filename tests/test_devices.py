"""Training on two processes (gloo, CPU): the same as on one, stopped and resumed together, or refused with a reason."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from accelerate.commands import launch
from accelerate.state import AcceleratorState, PartialState
from safetensors.numpy import load_file

from a3tune.commands.evaluate import evaluate_run
from a3tune.config import AlignmentConfig, DataConfig, EvaluationConfig, RunConfig
from a3tune.data.rows import write_rows
from a3tune.errors import ConfigError, DataError, RunError
from a3tune.evaluation.predictions import read_maps
from a3tune.evaluation.results import Results
from a3tune.run.folder import RunFolder
from a3tune.training import step
from a3tune.training.best import read_best
from a3tune.training.interrupt import Interrupted
from a3tune.training.train import train
from injection import context
from trainings import (
    CASES,
    At,
    History,
    Learnt,
    assert_alike,
    case_for,
    config_of,
    learner,
    metrics,
    samples,
    write_base,
)

RECIPES = Path(__file__).parents[1] / "recipes" / "devices"


def together(job: Callable[..., Any], *arguments: Any, recipe: str | None = None) -> list[Any]:
    """What `job(*arguments)` returns on each of two processes, launched with a recipe's variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    if recipe:
        shared |= variables(recipe)
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    started = [
        context.Process(target=_process, args=(shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, theirs, job, arguments))
        for r, (_, theirs) in enumerate(pipes)
    ]
    for process in started:
        process.start()
    for _, theirs in pipes:
        theirs.close()
    found = [ours.recv() for ours, _ in pipes]
    for process in started:
        process.join()
    for answer in found:
        assert not isinstance(answer, str), answer
    return [answer[0] for answer in found]


def _process(variables: dict[str, str], answer: Any, job: Callable[..., Any], arguments: Any) -> None:
    os.environ |= variables
    torch.set_num_threads(1)
    if "FSDP_VERSION" in variables:
        _call_processors_accelerators()
    try:
        answer.send((job(*arguments),))
    except BaseException:
        answer.send(traceback.format_exc())


def _call_processors_accelerators() -> None:
    """accelerate leaves FSDP off where there is no accelerator; nothing else of it needs one."""
    make = AcceleratorState.__init__

    def pretending(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        PartialState(cpu=True)
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        make(self, *args, **kwargs)

    AcceleratorState.__init__ = pretending  # type: ignore[method-assign]


def launched(recipe: str) -> Any:
    """The arguments that `accelerate launch --config_file` makes of a recipe; an error for a key it does not know."""
    words = ["--config_file", str(RECIPES / f"{recipe}.yaml"), "train.py"]
    return launch._validate_launch_command(launch.launch_command_parser().parse_args(words))[0]


def variables(recipe: str) -> dict[str, str]:
    """The environment that it gives to the processes, as far as the recipe decides."""
    before = dict(os.environ)
    return {name: x for name, x in launch.prepare_multi_gpu_env(launched(recipe)).items() if before.get(name) != x}


def learn(folder: Path, cases: list[dict[str, Any]]) -> list[Learnt]:
    """Gradients of every step, log lines and the selector's scores."""
    found = []
    for index, case in enumerate(cases):
        history = History()
        trainer = learner(folder / str(index), case, history)
        if trainer.alignment.selector.mode == "fixed":
            trainer.calibrate_heads()
        trainer.train()
        scores = {name: value.numpy() for name, value in trainer.alignment.selector.state_dict().items()}
        found.append((history.steps, trainer.state.log_history[:-1], scores))
    return found


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    first, second = together(learn, tmp_path, [case_for(case, 2) for case in CASES])
    alone = learn(tmp_path, [case_for(case, 1) for case in CASES])
    for index, case in enumerate(CASES):
        assert len(first[index][1]) == case["max_steps"]
        assert_alike(first[index], second[index])
        assert_alike(first[index], alone[index])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def steady(base: Path, output: Path, size: int, accumulation: int) -> RunConfig:
    """A run without anything that depends on how its samples are cut into passes."""
    config = config_of(base, output, batch_size=size, accumulation=accumulation, save_steps=100)
    return replace(config, alignment=AlignmentConfig(heads=2, head_selection="fixed"))


def adapter(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = adapter(one), adapter(other)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=2e-4, err_msg=name)
    assert [line["step"] for line in metrics(one)] == [1, 2, 3, 4]
    for mine, its in zip(metrics(one), metrics(other), strict=True):
        for name in ("loss", "loss_align", "labelled", "grad_norm", "learning_rate"):
            assert mine[name] == pytest.approx(its[name], rel=1e-3), name


def stopped(config: RunConfig, rank: int = 0, after: int = 2, number: int = signal.SIGTERM) -> str:
    """What the run says when one process is signalled in a step."""

    def stop() -> None:
        if int(os.environ.get("RANK", rank)) == rank:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as told:
        train(config, callbacks=[At(after, stop)])
    return str(told.value)


def refused(config: RunConfig) -> str:
    with pytest.raises(RunError) as told:
        train(config, callbacks=())
    return str(told.value)


def lose(config: RunConfig) -> str:
    """A run whose loss is NaN on the second process alone, in step 2."""
    right = step.alignment_loss

    def wrong(*args: Any) -> torch.Tensor:
        return right(*args) * torch.nan

    def spoil() -> None:
        if os.environ["RANK"] == "1":
            step.alignment_loss = wrong

    with pytest.raises(RunError) as told:
        train(config, callbacks=[At(2, spoil)])
    step.alignment_loss = right
    return str(told.value)


def life(base: Path, folder: Path) -> tuple[str, str, str]:
    """Runs on two processes that are stopped, taken over from one process, refused, or come to nothing."""
    said = stopped(steady(base, folder / "shrinks", 2, 1), rank=1)
    train(steady(base, folder / "grows", 2, 2), callbacks=())
    return said, refused(steady(base, folder / "odd", 4, 1)), lose(steady(base, folder / "lost", 2, 1))


def test_runs_stop_together_and_go_on_with_other_numbers_of_processes(base: Path, tmp_path: Path) -> None:
    whole = train(steady(base, tmp_path / "whole", 4, 1), callbacks=())
    stopped(steady(base, tmp_path / "grows", 2, 2), after=3)
    stopped(steady(base, tmp_path / "odd", 4, 1), after=1)
    (said, why, lost), others = together(life, base, tmp_path)
    assert (said, why, lost) == others

    assert "stopped after step 2 of 4" in said
    assert [p.name for p in (tmp_path / "shrinks" / "checkpoints").iterdir()] == ["checkpoint-2"]
    train(steady(base, tmp_path / "shrinks", 2, 1), callbacks=())
    assert_same_run(tmp_path / "shrinks", whole)
    assert_same_run(tmp_path / "grows", whole)
    assert "takes 4 samples, which 2 processes cannot share in batches of 4" in why

    assert "step 2: the loss is nan on samples" in lost
    assert "nonfinite.json" in lost
    record = json.loads((tmp_path / "lost" / "nonfinite.json").read_text())
    assert record["step"] == 2
    first, second = record["processes"]
    assert (first["broken"], second["broken"]) == (False, True)
    assert second["loss_align"] == second["loss"] == "nan" != second["loss_llm"]
    assert all(name in lost for name in second["samples"])
    assert not any(f"{name}," in lost for name in first["samples"])
    assert not (tmp_path / "lost" / "adapter").exists()


def share_out(base: Path, folder: Path) -> None:
    config = steady(base, folder / "run", 1, 2)
    stopped(config, rank=1)
    train(config, callbacks=())


def watched(base: Path, output: Path, size: int) -> RunConfig:
    """A run that measures itself on five rows, in batches that two processes share unevenly."""
    config = steady(base, output, size, 1)
    settings = {"eval_steps": 1, "eval_samples": 5, "keep_best": "loss_llm", "patience": 3, "save_steps": 2}
    return replace(
        config,
        data=replace(config.data, validation=base / "train.jsonl"),
        evaluation=EvaluationConfig(2, 4),
        training=replace(config.training, **settings),
    )


def watch(base: Path, folder: Path) -> str:
    said = stopped(watched(base, folder, 2), rank=1, after=2)
    train(watched(base, folder, 2), callbacks=())
    return said


def unwatchable(base: Path, folder: Path) -> str:
    with pytest.raises(ConfigError) as told:
        train(watched(base, folder, 2), callbacks=())
    return str(told.value)


def test_two_processes_measure_as_one(base: Path, tmp_path: Path) -> None:
    """Also when they were stopped together and went on."""
    whole = train(watched(base, tmp_path / "whole", 4), callbacks=())
    assert "after step 2 of 4" in together(watch, base, tmp_path / "run")[1]
    mine, other = ([line for line in metrics(run) if "eval_loss" in line] for run in (tmp_path / "run", whole))
    assert [line["step"] for line in mine] == [1, 2, 3, 4]
    for ours, theirs in zip(mine, other, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    ours, theirs = (read_best(RunFolder(run)) for run in (tmp_path / "run", whole))
    assert ours and theirs and ours.step == theirs.step
    found, expected = (load_file(run / "best" / "adapter_model.safetensors") for run in (tmp_path / "run", whole))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=2e-4, err_msg=name)


def test_weights_that_are_shared_out_are_not_measured(base: Path, tmp_path: Path) -> None:
    assert "training.eval_steps: no process holds" in together(unwatchable, base, tmp_path / "run", recipe="fsdp2")[0]


def test_fsdp2_learns_saves_and_goes_on(base: Path, tmp_path: Path) -> None:
    """Through accelerate, with the recipe's settings."""
    whole = train(steady(base, tmp_path / "whole", 4, 1), callbacks=())
    together(share_out, base, tmp_path, recipe="fsdp2")
    assert_same_run(tmp_path / "run", whole)


def answer(base: Path, out: Path, first: int | None = None) -> Results:
    """Evaluates `samples(5)`, or only the first batches of them: as if it had been stopped there."""

    def stop(done: int, total: int) -> None:
        if first is not None and done >= first:
            raise KeyboardInterrupt

    config = replace(steady(base, out, 2, 1), evaluation=EvaluationConfig(1, 4, occlude=True, fillings=("mean",)))
    config = replace(config, data=DataConfig(test=base / "test.jsonl"))
    return evaluate_run(config, None, stop)


def answers(folder: Path) -> list[str]:
    return [line.partition(', "cost"')[0] for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_two_processes_answer_as_one(base: Path, tmp_path: Path) -> None:
    """Five batches, of which two were answered before: a round of two, and one for one of them."""
    (base / "test.jsonl").write_text("".join((base / "train.jsonl").read_text().splitlines(keepends=True)[:5]))
    alone = answer(base, tmp_path / "alone")
    with pytest.raises(KeyboardInterrupt):
        answer(base, tmp_path / "shared", first=2)
    assert len(answers(tmp_path / "shared")) == 2
    results, others = together(answer, base, tmp_path / "shared")
    assert results.predictions == others.predictions == alone.predictions
    assert results.metrics == alone.metrics
    assert answers(tmp_path / "shared") == answers(tmp_path / "alone")
    assert read_maps(RunFolder(tmp_path / "shared")).keys() == alone.maps.keys()
    found, expected = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("shared", "alone"))
    assert found["metrics"] == expected["metrics"]
    assert expected["counts"]["with_reliance"] and expected["metrics"]["reliance_inside"]["count"]


def test_recipes_say_what_accelerate_understands() -> None:
    assert launched("ddp").multi_gpu
    assert variables("fsdp2")["FSDP_VERSION"] == "2"
    assert variables("fsdp2")["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert [launched(f"zero{stage}").zero_stage for stage in (2, 3)] == [2, 3]
    assert launched("zero3").zero3_save_16bit_model


def test_batch_size_and_accumulation_may_change_together(base: Path, tmp_path: Path) -> None:
    config = steady(base, tmp_path / "run", 4, 1)
    stopped(config)
    train(steady(base, tmp_path / "run", 2, 2), callbacks=())
    assert_same_run(tmp_path / "run", train(steady(base, tmp_path / "whole", 4, 1), callbacks=()))


def test_a_data_loading_process_that_dies_is_named(base: Path, tmp_path: Path) -> None:
    config = steady(base, tmp_path / "run", 2, 1)
    config = replace(config, training=replace(config.training, workers=1))

    def kill() -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(RunError, match=r"a data-loading process died: DataLoader worker .* lower training\.workers"):
        train(config, callbacks=[At(2, kill)])


def test_a_sample_that_a_data_loading_process_cannot_use_is_named_without_traceback(base: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [replace(sample, image=tmp_path / "broken.png") for sample in samples(2)]
    write_rows(tmp_path / "train.jsonl", rows)
    config = steady(base, tmp_path / "run", 2, 1)
    config = replace(
        config,
        data=DataConfig(train=tmp_path / "train.jsonl"),
        alignment=AlignmentConfig(weight=0.0),
        training=replace(config.training, workers=1),
    )
    with pytest.raises(DataError, match=r"^sample s\d: ") as told:
        train(config, callbacks=())
    assert "Traceback" not in str(told.value)


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["a3tune", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("a3tune", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("a3tune ")
