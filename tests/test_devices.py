"""Training on two processes (gloo, CPU): the same as on one, stopped and resumed together, or refused with a reason."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import traceback
from collections.abc import Callable, Mapping
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
from a3tune.training import trainer as trainer_room
from a3tune.training.interrupt import Interrupted
from a3tune.training.train import train
from a3tune.training.trainer import A3Trainer
from injection import context
from test_trainer import At, Gradients, config_of, make_trainer, metrics, samples, write_base

RECIPES = Path(__file__).parents[1] / "recipes" / "devices"
LABELLED = (0, 1, 4)
"""So few that a process often has no label at all."""
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
"""Adam makes much of gradients that are zero but for rounding."""
BATCH = AlignmentConfig(weight=0.5, heads=3, head_selection="batch")
CASES: list[dict[str, Any]] = [
    {"alignment": BATCH, "max_steps": 3, "global": (4, 1)},
    {"alignment": replace(BATCH, head_selection="running", variant="code"), "max_steps": 2, "global": (2, 3)},
    {
        "alignment": replace(BATCH, head_selection="fixed"),
        "max_steps": 1,
        "global": (2, 2),
        "activation_checkpointing": True,
    },
]
"""`global`: samples per pass over all processes, and passes per step. 10 samples leave a short end of each epoch."""


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


class History(Gradients):
    """The gradients of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, np.ndarray]] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().on_pre_optimizer_step(*args, **kwargs)
        self.steps.append({name: value.numpy() for name, value in self.found.items()})


def learner(folder: Path, case: Mapping[str, Any], *callbacks: Any) -> A3Trainer:
    few = [replace(s, regions=s.regions if i in LABELLED else None) for i, s in enumerate(samples(10))]
    trainer = make_trainer(folder, few, callbacks=list(callbacks), **SGD | dict(case))
    with torch.no_grad():  # LoRA's zero matrices would leave most gradients zero
        for parameter in trainer.model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    return trainer


Learnt = tuple[list[dict[str, np.ndarray]], list[dict[str, Any]], dict[str, np.ndarray]]


def learn(folder: Path, cases: list[dict[str, Any]]) -> list[Learnt]:
    """Gradients of every step, log lines and the selector's scores."""
    found = []
    for index, case in enumerate(cases):
        history = History()
        trainer = learner(folder / str(index), case, history)
        assert trainer.selector is not None
        if trainer.alignment.head_selection == "fixed":
            trainer.calibrate_heads()
        trainer.train()
        scores = {name: value.numpy() for name, value in trainer.selector.state_dict().items()}
        found.append((history.steps, trainer.state.log_history[:-1], scores))
    return found


def case_for(case: dict[str, Any], processes: int) -> dict[str, Any]:
    size, accumulation = case["global"]
    rest = {name: value for name, value in case.items() if name != "global"}
    return rest | {"per_device_train_batch_size": size // processes, "gradient_accumulation_steps": accumulation}


def assert_alike(mine: Learnt, other: Learnt) -> None:
    for step, (ours, theirs) in enumerate(zip(mine[0], other[0], strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_allclose(value, theirs[name], atol=1e-5, rtol=1e-4, err_msg=f"{step} {name}")
    for ours, theirs in zip(mine[1], other[1], strict=True):
        assert ours["heads_selected"] == theirs["heads_selected"]
        for name in ("loss", "loss_llm", "loss_align", "labelled", "attention_inside", "grad_norm", "epoch"):
            assert ours.get(name) == pytest.approx(theirs.get(name), rel=1e-4), name
    for name, score in mine[2].items():
        np.testing.assert_allclose(score, other[2][name], rtol=1e-5)


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
    right = trainer_room.alignment_loss

    def wrong(*args: Any) -> torch.Tensor:
        return right(*args) * torch.nan

    def spoil() -> None:
        if os.environ["RANK"] == "1":
            trainer_room.alignment_loss = wrong

    with pytest.raises(RunError) as told:
        train(config, callbacks=[At(2, spoil)])
    trainer_room.alignment_loss = right
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

    config = replace(steady(base, out, 2, 1), evaluation=EvaluationConfig(batch_size=1, max_new_tokens=4))
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


def test_recipes_say_what_accelerate_understands() -> None:
    assert launched("ddp").multi_gpu
    assert variables("fsdp2")["FSDP_VERSION"] == "2"
    assert variables("fsdp2")["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert [launched(f"zero{stage}").zero_stage for stage in (2, 3)] == [2, 3]
    assert launched("zero3").zero3_save_16bit_model


def test_zero3_cannot_rank_heads_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = learner(tmp_path, case_for(CASES[2], 1))
    monkeypatch.setattr(trainer_room, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigError, match=r"head_selection: fixed .* ZeRO-3"):
        trainer.calibrate_heads()


class Small:
    """A device that has too little memory for more than `most` samples in a pass."""

    def __init__(self, trainer: A3Trainer, most: int, where: str) -> None:
        self.most, self.where = most, where
        self.passes: list[int] = []
        forward, backward = trainer.model.forward, trainer.accelerator.backward

        def forward_in_memory(**inputs: Any) -> Any:
            self.passes.append(len(inputs["input_ids"]))
            if where == "forward":
                self.refuse()
            return forward(**inputs)

        def backward_in_memory(loss: torch.Tensor, **options: Any) -> None:
            backward(loss, **options)  # the worst moment: some gradients are there
            if where == "backward":
                self.refuse()

        trainer.model.forward = forward_in_memory
        trainer.accelerator.backward = backward_in_memory

    def refuse(self) -> None:
        if self.passes[-1] > self.most:
            raise torch.OutOfMemoryError("too little")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_too_little_memory_halves_the_passes_and_changes_nothing_else(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = case_for({"alignment": replace(BATCH, head_selection="fixed"), "max_steps": 2, "global": (4, 2)}, 1)
    found: list[Learnt] = []
    for most in (4, 1):
        history = History()
        trainer = learner(tmp_path / str(most), case, history)
        small = Small(trainer, most, where)
        trainer.train()
        found.append((history.steps, trainer.state.log_history[:-1], {}))
    assert_alike(*found)
    # 10 samples are two steps of (4, 4) and (2); the second pass of 2 samples, and all later ones, are single.
    assert small.passes == [4, 2, *[1] * 8, *[1] * 2]
    assert len(caplog.messages) == 2
    assert "going on with 1" in caplog.messages[-1]


def test_memory_that_never_suffices_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_for(CASES[0], 1)
    trainer = learner(tmp_path, case)
    Small(trainer, 0, "forward")
    with pytest.raises(RunError, match=r"too little memory for one sample \("):
        trainer.train()
    several = learner(tmp_path, case)
    Small(several, 2, "forward")
    monkeypatch.setattr(A3Trainer, "alone", False)
    with pytest.raises(RunError, match=r"training\.batch_size=2 and 2 times the training\.accumulation"):
        several.train()


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
