"""Attention alignment in training scripts of others: a plain loop, a Trainer; the same losses as our own command's."""

import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from a3tune.adapters import A3MoEConfig
from a3tune.data.rows import read_rows
from a3tune.errors import ConfigError, DataError, ModelError
from a3tune.training.mixin import HEADS_FILE, AlignmentMixin
from a3tune.training.step import Alignment
from a3tune.vlm.load import load_vlm
from first_step import first_step_of_command
from test_devices import together
from trainings import fresh_vlm, samples

EXAMPLES = Path(__file__).parents[1] / "examples"
# PEFT 0.21 asks the model by a name that transformers has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set"),
]
SMALL: dict[str, Any] = {"r": 4, "expert_rank": 2, "query_experts": 2, "key_experts": 3, "router_hidden": 8}


class Mine(AlignmentMixin, Trainer):
    pass


def aligned(**settings: Any) -> tuple[Any, Alignment]:
    vlm = fresh_vlm()
    torch.manual_seed(3)
    model = get_peft_model(vlm.model, A3MoEConfig(**SMALL))
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    return model, Alignment(model, vlm.processor, **{"heads": 3, "weight": 0.5} | settings)


def make(
    folder: Path,
    data: list[Any],
    *,
    evaluated: Any = None,
    callbacks: Any = None,
    metrics: Any = None,
    alignment: Any = None,
    **changes: Any,
) -> Mine:
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1}
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 1}
    model, align = aligned(**{"head_selection": "running"} | (alignment or {}))
    args = TrainingArguments(str(folder), **settings | fixed | changes)
    own = {"alignment": align, "callbacks": callbacks, "compute_metrics": metrics}
    return Mine(model, args, align.collate, data, evaluated, **own)


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_loop_and_trainer_lose_what_the_command_line_does(tmp_path: Path) -> None:
    data, line = first_step_of_command(tmp_path)

    vlm = load_vlm("tiny", device="cpu", attention=False)
    model = get_peft_model(vlm.model, A3MoEConfig(r=8)).train()
    align = Alignment(model, vlm.processor, weight=0.3, heads=0.125)
    found = align.losses(model, align.collate(read_rows(data)))
    assert float(found.total.detach()) == pytest.approx(line["loss"], rel=1e-6)
    assert [float(found.llm), float(found.align)] == pytest.approx([line["loss_llm"], line["loss_align"]], rel=1e-6)

    args = TrainingArguments(str(tmp_path / "out"), max_steps=1, logging_steps=1, use_cpu=True, report_to="none")
    trainer = Mine(model, args, align.collate, read_rows(data), alignment=align)
    trainer.train()
    for name in ("loss", "loss_llm", "loss_align", "labelled", "attention_inside"):
        assert trainer.state.log_history[0][name] == pytest.approx(line[name], rel=1e-6), name
    assert trainer.state.log_history[0]["heads_selected"] == line["heads_selected"]


def test_examples_take_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("plain_loop", "trainer", "accelerate"):
        path = EXAMPLES / f"align_{name}.py"
        assert len(path.read_text().splitlines()) <= 40
        found.append(runpy.run_path(str(path))["main"](tmp_path / name, True))
    first, second = zip(*found, strict=True)
    assert first == pytest.approx([first[0]] * 3, rel=1e-6)
    assert max(second) < min(first)


def test_the_weight_falls_over_the_training(tmp_path: Path) -> None:
    data = samples(6)
    trainer = make(tmp_path, data, alignment={"until": 0.75}, evaluated=data)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss_align" in line]
    weights = [(line["loss"] - line["loss_llm"]) / line["loss_align"] for line in lines]
    assert weights == pytest.approx([0.5, 0.375, 0.125, 0.0], rel=1e-3)
    before = trainer.evaluate()["eval_loss"]
    trainer.alignment.progress = 1.0
    assert trainer.evaluate()["eval_loss"] == before, "losses in a training are to be compared with each other"


def test_a_loop_says_how_far_it_is_where_the_weight_falls() -> None:
    model, align = aligned(until=0.5)
    batch = align.collate(samples(2))
    for wrong in (None, -0.1, 7):
        align.progress = wrong
        with pytest.raises(ConfigError, match=r"share of the training.*align\.progress = step / steps"):
            align.loss(model, batch)
    found = []
    for align.progress in (0.0, 0.25, 0.5, 1.0):
        losses = align.losses(model, batch)
        assert losses.align is not None
        found.append((float(losses.total.detach()) - float(losses.llm)) / float(losses.align))
    assert found == pytest.approx([0.5, 0.25, 0.0, 0.0], abs=1e-4)


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole, data = make(tmp_path / "whole", samples(6)), samples(6)
    whole.train()
    first = make(tmp_path / "parts", data, save_steps=2, callbacks=[StopAt(2)])
    first.train()
    assert (tmp_path / "parts" / "checkpoint-2" / HEADS_FILE).is_file()
    second = make(tmp_path / "parts", data, save_steps=2)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(whole)
    score, expected = (trainer.alignment.selector.state_dict()["score_LH"] for trainer in (second, whole))
    assert torch.equal(score, expected)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_an_evaluation_amid_it_leaves_no_trace(tmp_path: Path) -> None:
    def metrics(predicted: Any) -> dict[str, float]:
        shapes.append([value.shape for value in predicted.predictions])
        return {"seen": len(predicted.label_ids)}

    shapes: list[Any] = []
    alone = make(tmp_path, samples(5))
    often = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    watched = make(tmp_path, samples(5), evaluated=samples(8)[5:], metrics=metrics, **often)
    alone.train()
    watched.train()
    assert losses(watched) == losses(alone)
    seen = [line["eval_loss"] for line in watched.state.log_history if "eval_loss" in line]
    assert len(seen) == 4 and all(value > 0 for value in seen)
    assert shapes[0][0][:1] == (3,) and shapes[0][0][2] == watched.model.config.text_config.vocab_size


def test_processes_that_load_data_change_nothing(tmp_path: Path) -> None:
    found = [make(tmp_path, samples(4), max_steps=2, dataloader_num_workers=workers) for workers in (0, 1)]
    for trainer in found:
        trainer.train()
    assert losses(found[0]) == losses(found[1])


def test_fixed_heads_are_ranked_on_rows_of_any_kind(tmp_path: Path) -> None:
    rows = [{"image": s.image, "prompt": s.prompt, "answer": s.answer, "regions": None} for s in samples(4)]
    trainer = make(tmp_path, rows, max_steps=1)
    model, trainer.alignment = trainer.model, replace_heads(trainer.alignment)
    with pytest.raises(ConfigError, match="calibrate"):
        trainer.train()
    trainer.calibrate_heads()
    trainer.train()
    assert trainer.model is model and trainer.alignment.heads_LH.sum() == 3


def replace_heads(alignment: Alignment) -> Alignment:
    return Alignment(alignment.vlm.model, alignment.vlm.processor, heads=3, weight=0.5, head_selection="fixed")


@pytest.mark.parametrize(
    ("changes", "others", "named"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
        ({}, {"compute_loss_func": lambda *args, **kwargs: None}, "compute_loss_func"),
    ],
)
def test_another_loss_beside_ours_is_refused(tmp_path: Path, changes: Any, others: Any, named: str) -> None:
    model, align = aligned()
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **changes)
    with pytest.raises(ConfigError, match=f"{named}: expected none"):
        Mine(model, args, align.collate, samples(2), alignment=align, **others)


def test_the_mixin_comes_first() -> None:
    """Behind a Trainer with a loss of its own that one would be learnt, and nobody would notice."""

    class Other(Trainer):
        pass

    with pytest.raises(ConfigError, match=r"expected AlignmentMixin before Other, .*\(AlignmentMixin, Other\)"):
        type("Late", (Other, AlignmentMixin), {})
    assert issubclass(type("First", (AlignmentMixin, Other), {}), Other)


@pytest.mark.parametrize("alignment", [None, {"weight": 0.5}])
def test_an_alignment_that_is_none_is_told(alignment: Any, tmp_path: Path) -> None:
    model, align = aligned()
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ConfigError, match=r"alignment: expected an a3tune\.Alignment, got"):
        Mine(model, args, align.collate, samples(2), alignment=alignment)


def test_a_trainer_without_our_collator_is_told(tmp_path: Path) -> None:
    trainer = make(tmp_path, [{"image": "a.png", "prompt": "Where?", "answer": "left"}] * 4)
    trainer.data_collator = default_data_collator
    with pytest.raises(DataError, match="give it as the data_collator"):
        trainer.train()


def test_a_state_of_something_else_is_told() -> None:
    _, align = aligned()
    align.load_state_dict(align.state_dict())
    with pytest.raises(ConfigError, match=r"state: expected what Alignment\.state_dict returned, got exp_avg"):
        align.load_state_dict({"exp_avg": torch.ones(2)})


def test_two_alignments_of_a_model_do_not_disturb_each_other() -> None:
    model, align = aligned()
    batch = align.collate(samples(2))
    before = align.loss(model, batch)[0]
    other = Alignment(model, align.vlm.processor, heads=8, weight=2.0, rows="answer")
    assert not torch.equal(other.loss(model, batch)[0], before)
    assert torch.equal(align.loss(model, batch)[0], before)


def test_a_model_is_compiled_afterwards() -> None:
    model, align = aligned()
    with pytest.raises(ModelError, match="compile or wrap a model afterwards"):
        Alignment(torch.compile(model, backend="eager"), align.vlm.processor)


def test_a_batch_of_another_collator_is_refused() -> None:
    model, align = aligned()
    batch = {name: value for name, value in align.collate(samples(2)).items() if name != "segments"}
    with pytest.raises(DataError, match=r"batch: segments: missing; expected a batch of Alignment\.collate"):
        align.loss(model, batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, r"alignment\.weight: expected a number >= 0"),
        ({"heads": 9}, "heads: expected at most 8"),
        ({"heads": 2.0}, r"alignment\.heads"),
        ({"rows": "everywhere"}, r"alignment\.rows: expected"),
        ({"load_balance": -0.1}, r"training\.load_balance"),
    ],
)
def test_settings_out_of_range_are_told_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        aligned(**settings)


def test_what_is_no_model_or_processor_is_told_at_once() -> None:
    vlm = fresh_vlm()
    with pytest.raises(ModelError, match="model: expected one of transformers"):
        Alignment(torch.nn.Linear(2, 2), vlm.processor)
    with pytest.raises(ModelError, match="expected a processor with a tokenizer and an image processor"):
        Alignment(vlm.model, vlm.tokenizer)


def test_adapters_learn_which_tokens_are_no_text() -> None:
    """As those of `add_adapter`: what generate keeps out of the prompt is what the training keeps out."""
    vlm = fresh_vlm()
    align = Alignment(vlm.model, vlm.processor, heads=3)
    later = get_peft_model(vlm.model, A3MoEConfig(**SMALL))
    assert later.active_peft_config.control_ids == []
    align.loss(later, align.collate(samples(1)))
    assert later.active_peft_config.control_ids == list(vlm.control_ids) != []
    own = get_peft_model(fresh_vlm().model, A3MoEConfig(**SMALL, control_ids=[1]))
    Alignment(own, vlm.processor, heads=3)
    assert own.active_peft_config.control_ids == [1]


def test_without_experts_no_routing_is_passed() -> None:
    vlm = fresh_vlm()
    model = get_peft_model(vlm.model, LoraConfig(target_modules=["q_proj"]))
    align = Alignment(model, vlm.processor, heads=3)
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    loss, outputs = align.loss(model, align.collate(samples(2)))
    assert "routing" not in seen[0] and "capture" in seen[0]
    assert loss.requires_grad and outputs.logits is not None


def of_a_process(rows: int) -> tuple[tuple[int, int, int], dict[str, np.ndarray]]:
    """Counts and gradients of a loop of one's own under DDP, with two uneven batches per process."""
    state = PartialState(cpu=True)
    torch.manual_seed(0)
    model, align = aligned()
    shared: Any = DistributedDataParallel(model) if state.num_processes > 1 else model
    mine = samples(rows)[state.process_index :: state.num_processes]
    batches = [align.collate(mine[:1]), align.collate(mine[1:])]
    counts = align.count(batches)
    for batch in batches:
        align.loss(shared, batch, counts)[0].backward()
    kept = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return (int(counts.tokens), counts.samples, counts.processes), kept


def test_a_loop_on_two_processes_takes_the_step_of_one() -> None:
    first, second = together(of_a_process, 6)
    model, align = aligned()
    batches = [
        align.collate(samples(6)[:2]),
        align.collate(samples(6)[2:]),
    ]  # heads are chosen by these
    counts = align.count(batches)
    assert first[0] == second[0] == (counts.tokens, 6, 2)
    for batch in batches:
        align.loss(model, batch, counts)[0].backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            np.testing.assert_allclose(first[1][name], parameter.grad, atol=1e-6, rtol=1e-4, err_msg=name)
            assert np.array_equal(first[1][name], second[1][name])


def test_gradients_of_a_step_do_not_depend_on_its_parts() -> None:
    model, align = aligned(head_selection="fixed")
    align.selector.fix([(0, 1), (1, 0), (1, 3)], (2, 4))
    found = []
    for cuts in ((0, 6), (0, 2, 3, 6)):
        batches = [align.collate(samples(6)[a:b]) for a, b in pairwise(cuts)]
        counts = align.count(batches)
        model.zero_grad()
        for batch in batches:
            align.loss(model, batch, counts)[0].backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=1e-4, msg=name)
