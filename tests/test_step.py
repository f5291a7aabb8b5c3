"""The losses of one batch, without a Trainer: as anybody's training loop would take them."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from a3tune.adapters import add_adapter
from a3tune.attention.align import alignment_loss, averaged_map
from a3tune.attention.capture import stack
from a3tune.config import AdapterConfig, AlignmentConfig
from a3tune.errors import ModelError
from a3tune.labels.truth import truth_labels
from a3tune.training.collate import IGNORED, Collator, split_batch
from a3tune.training.step import Alignment, AlignmentStatistics, Counts
from trainings import ADAPTER, fresh_vlm, samples

CONFIG = AlignmentConfig(weight=0.5, until=None, heads=3)
ANYWHERE = [(0, 1), (1, 0), (1, 3)]


@pytest.fixture(scope="module")
def learner() -> tuple[torch.nn.Module, Collator]:
    """An adapted model in the midst of its training, and batches for it."""
    vlm = fresh_vlm()
    torch.manual_seed(3)
    model = add_adapter(vlm.model, AdapterConfig("a3moe", **ADAPTER))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.05)
    return model, Collator(vlm, truth_labels)


def gradients(model: torch.nn.Module, losses: Sequence[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def look_at(model: torch.nn.Module, batch: dict[str, Any], alignment: Alignment) -> tuple[Tensor, AlignmentStatistics]:
    """The alignment in a loop of one's own: another trainer's, say."""
    inputs, masks = split_batch(batch)
    request = alignment.request(masks)
    outputs = model(**inputs, use_cache=False, capture=request, output_attentions=True)
    return alignment.measure(outputs.attentions, request, batch["segments"])


def made(learner: tuple[torch.nn.Module, Collator], config: AlignmentConfig = CONFIG, **more: Any) -> Alignment:
    return Alignment(learner[0], learner[1].vlm.processor, **asdict(config), **more)


def fixed(learner: tuple[torch.nn.Module, Collator], variant: Any = "paper") -> Alignment:
    alignment = made(learner, replace(CONFIG, head_selection="fixed", variant=variant))
    alignment.selector.fix(ANYWHERE, (2, 4))
    return alignment


def test_the_loss_is_that_of_the_equations(learner: tuple[torch.nn.Module, Collator]) -> None:
    model, collator = learner
    batch = collator(samples(3))
    alignment = fixed(learner)
    loss, statistics = look_at(model, batch, alignment)
    inputs, masks = split_batch(batch)
    request = alignment.request(masks)
    outputs = model(**inputs, use_cache=False, capture=request, output_attentions=True)
    heads_LH = torch.zeros(2, 4, dtype=torch.bool)
    heads_LH[tuple(torch.tensor(ANYWHERE).T)] = True
    map_BN = averaged_map(stack(outputs.attentions, request).map_BLHN, heads_LH)
    torch.testing.assert_close(loss, alignment_loss(map_BN, batch["segments"]).mean())
    assert alignment.heads_LH is not None and torch.equal(alignment.heads_LH, heads_LH)
    assert (statistics.samples, statistics.labelled, statistics.kept) == (3, 2, None)
    assert 0 < statistics.inside < 2 and not statistics.inside.requires_grad


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_batches_of_a_step_add_up(learner: tuple[torch.nn.Module, Collator], variant: Any) -> None:
    """Uneven batches, one of them without any label."""
    model, collator = learner
    data = samples(6)
    parts = [data[:2], data[2:3], data[3:]]

    def losses(some: Sequence[Any]) -> Any:
        return fixed(learner, variant).losses(model, collator(some), counts)

    counts = fixed(learner).count(collator(part) for part in parts)
    assert counts == Counts(int((collator(data)["labels"] != IGNORED).sum()), 6)
    whole, split = losses(data), [losses(part) for part in parts]
    torch.testing.assert_close(sum(part.llm for part in split), whole.llm)
    torch.testing.assert_close(sum(part.align for part in split), whole.align)
    torch.testing.assert_close(whole.total.detach(), whole.llm + CONFIG.weight * whole.align)
    for name in ("samples", "labelled", "inside"):
        torch.testing.assert_close(
            sum(getattr(part.statistics, name) for part in split), getattr(whole.statistics, name)
        )
    expected, added = gradients(model, [whole.total]), gradients(model, [part.total for part in split])
    for name, value in expected.items():
        torch.testing.assert_close(added[name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_two_processes_average_what_one_would_sum(learner: tuple[torch.nn.Module, Collator]) -> None:
    model, collator = learner
    batch = collator(samples(2))
    counts = fixed(learner).count([batch])
    alone = fixed(learner).losses(model, batch, counts)
    shared = fixed(learner).losses(model, batch, replace(counts, processes=2))
    assert torch.equal(fixed(learner).loss(model, batch)[0], alone.total)  # a batch is a step of its own
    torch.testing.assert_close(shared.total, 2 * alone.total)


def test_samples_that_only_fill_up_neither_vote_nor_count(learner: tuple[torch.nn.Module, Collator]) -> None:
    model, collator = learner
    data = samples(3)
    filled, alone = collator(data), collator(data[:2])
    filled["labels"][2] = IGNORED
    filled["segments"] = torch.ones(3, 1, filled["segments"].shape[2])  # those of the third would show
    filled["segments"][:2] = alone["segments"]
    alignments = made(learner), made(learner)
    counts = alignments[0].count([alone])
    assert alignments[0].count([filled]) == counts
    found, expected = (
        alignment.losses(model, batch, counts) for batch, alignment in zip((filled, alone), alignments, strict=True)
    )
    torch.testing.assert_close(found.total, expected.total)
    assert torch.equal(alignments[0].heads_LH, alignments[1].heads_LH)
    assert found.statistics.samples == 2 and found.statistics.labelled == 2


def test_without_alignment_there_is_the_language_loss_alone(learner: tuple[torch.nn.Module, Collator]) -> None:
    model, collator = learner
    batch = collator(samples(2))
    losses = made(learner, replace(CONFIG, weight=0.0)).losses(model, batch)
    assert losses.align is None and losses.statistics is None and losses.outputs.attentions is None
    inputs, _ = split_batch(batch)
    torch.testing.assert_close(losses.llm, model(**inputs, use_cache=False).loss.detach(), atol=0.05, rtol=0.05)


def test_it_goes_back_to_a_state_that_it_was_in(learner: tuple[torch.nn.Module, Collator]) -> None:
    model, collator = learner
    alignment = made(learner, replace(CONFIG, head_selection="running"))
    assert alignment.state_dict() == {}
    look_at(model, collator(samples(2)), alignment)
    before = alignment.state_dict()
    first, seen = look_at(model, collator(samples(6)[3:]), alignment)
    alignment.load_state_dict(before)
    again, seen_again = look_at(model, collator(samples(6)[3:]), alignment)
    assert torch.equal(first, again)
    assert seen.kept is not None and seen.kept == seen_again.kept
    alignment.load_state_dict({})
    assert look_at(model, collator(samples(2)), alignment)[1].kept is None


def test_attention_without_gradient_is_refused(learner: tuple[torch.nn.Module, Collator]) -> None:
    model, collator = learner
    batch = collator(samples(2))
    inputs, masks = split_batch(batch)
    alignment = made(learner)
    request = alignment.request(masks)
    outputs = model(**inputs, use_cache=False, capture=request, output_attentions=True)
    cut = [layer.detach() for layer in outputs.attentions]
    with pytest.raises(ModelError, match="no gradient reaches"):
        alignment.measure(cut, request, batch["segments"])
    with torch.no_grad():  # as in a validation
        assert alignment.measure(cut, request, batch["segments"])[0] > 0
