"""What is logged: averages of what happened since the last line."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from a3tune.training.log import LogSums, MetricsFile
from a3tune.training.step import AlignmentStatistics, StepLosses

ALONE: Any = SimpleNamespace(device=torch.device("cpu"), reduce=lambda tensor, reduction: tensor)


def losses(llm: float, align: float | None = None, kept: float | None = None, inside: float = 0.5) -> StepLosses:
    statistics = AlignmentStatistics(torch.tensor(4), torch.tensor(2), torch.tensor(2 * inside), kept)
    return StepLosses(
        total=torch.tensor(llm),
        llm=torch.tensor(llm),
        align=None if align is None else torch.tensor(align),
        statistics=None if align is None else statistics,
        outputs=None,
    )


def test_passes_of_a_step_add_up_and_steps_are_averaged() -> None:
    sums = LogSums()
    for first, second in (
        (losses(1.0, 0.25), losses(2.0, 0.25, 0.5)),
        (losses(3.0, 0.5, 1.0, 1.0), losses(2.0, 0.0, 0.0)),
    ):
        sums.add_step()
        sums.add_losses(first)
        sums.add_losses(second)
    assert sums.take(ALONE) == {
        "loss_llm": 4.0,
        "loss_align": 0.5,
        "labelled": 0.5,
        "attention_inside": pytest.approx(0.625),
        "heads_overlap": 0.5,
    }
    assert sums.take(ALONE) == {}


def test_without_alignment_only_the_language_loss_is_logged() -> None:
    sums = LogSums()
    sums.add_step()
    sums.add_losses(losses(1.0))
    assert sums.take(ALONE) == {"loss_llm": 1.0}


def test_a_copy_does_not_move() -> None:
    sums = LogSums()
    sums.add_step()
    before = sums.copy()
    sums.add_losses(losses(7.0))
    before.add_losses(losses(1.0))
    assert (sums.take(ALONE), before.take(ALONE)) == ({"loss_llm": 7.0}, {"loss_llm": 1.0})


def test_the_file_takes_every_line_once_and_no_number_that_json_lacks(tmp_path: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    file, state = MetricsFile(path), SimpleNamespace(is_world_process_zero=True, global_step=1)
    file.on_train_begin(None, state, None)
    state.global_step = 2
    file.on_log(None, state, None, {"loss": float("nan"), "heads_selected": ["01"]})
    file.on_log(None, state, None, {"train_runtime": 3.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1}, {"step": 2, "loss": None, "heads_selected": ["01"]}]
