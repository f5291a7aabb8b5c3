"""The averaged map and the alignment loss: values, padding, and gradients where there is nothing to divide by."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a3tune.attention.align import alignment_loss, averaged_map, inside_share, labelled
from a3tune.errors import ConfigError


def test_only_the_chosen_heads_are_averaged():
    attention = torch.rand(2, 3, 4, 5)
    heads = torch.zeros(3, 4, dtype=torch.bool)
    heads[0, 1] = heads[2, 3] = True
    torch.testing.assert_close(averaged_map(attention, heads), (attention[:, 0, 1] + attention[:, 2, 3]) / 2)
    grouped = torch.rand(2, 3, 4, 6, 5)
    torch.testing.assert_close(averaged_map(grouped, heads), (grouped[:, 0, 1] + grouped[:, 2, 3]) / 2)
    assert averaged_map(attention, torch.zeros_like(heads)).abs().sum() == 0


def test_by_hand():
    attention = torch.tensor([[0.1, 0.3, 0.0, 0.4]])
    segments = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5]]])
    torch.testing.assert_close(alignment_loss(attention, segments), torch.tensor([0.5**2 + 0.75**2]))


@pytest.mark.parametrize("scale", [1e-30, 1.0])
def test_all_attention_inside_is_zero_loss_at_any_scale(scale):
    attention = torch.tensor([[0.2, 0.8, 0.0]]) * scale
    assert alignment_loss(attention, torch.tensor([[[1.0, 1.0, 0.0]]])).item() == pytest.approx(0, abs=1e-12)
    assert alignment_loss(attention, torch.tensor([[[0.0, 0.0, 1.0]]])).item() == pytest.approx(1)


@given(st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_padding_changes_nothing(segment_padding, token_padding):
    generator = torch.Generator().manual_seed(segment_padding)
    attention, segments = torch.rand(2, 5, generator=generator), torch.rand(2, 3, 5, generator=generator)
    padded_map = torch.nn.functional.pad(attention, (0, token_padding))
    padded_segments = torch.nn.functional.pad(segments, (0, token_padding, 0, segment_padding))
    torch.testing.assert_close(alignment_loss(padded_map, padded_segments), alignment_loss(attention, segments))


def test_samples_without_labels_or_without_attention_contribute_nothing():
    attention = torch.rand(3, 4)
    attention[1] = 0
    attention.requires_grad_()
    segments = torch.ones(3, 2, 4) * 0.5
    segments[2] = 0
    assert labelled(segments).tolist() == [True, True, False]
    loss = alignment_loss(attention, segments)
    assert loss[0] > 0 and loss[1:].tolist() == [0, 0]
    loss.sum().backward()
    assert attention.grad is not None and attention.grad.isfinite().all()
    assert attention.grad[1:].abs().sum() == 0
    no_segment_axis = alignment_loss(attention, torch.zeros(3, 0, 4))
    assert no_segment_axis.tolist() == [0, 0, 0]


def test_descending_the_loss_moves_attention_into_the_segment():
    scores = torch.zeros(1, 6, requires_grad=True)
    segment = torch.tensor([[[0.0, 0.0, 1.0, 1.0, 0.0, 0.0]]])
    optimizer = torch.optim.SGD([scores], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        alignment_loss(scores.softmax(-1), segment).sum().backward()
        optimizer.step()
    assert scores.softmax(-1)[0, 2:4].sum() > 0.9


def test_the_code_variant_averages_squares_over_real_rows():
    attention = torch.tensor([[[0.2, 0.2], [0.0, 0.5], [0.0, 0.0]]], requires_grad=True)
    segments = torch.tensor([[[1.0, 0.0]]])
    loss = alignment_loss(attention, segments, "code")
    torch.testing.assert_close(loss, torch.tensor([(0.5**2 + 1.0**2) / 2]))
    loss.sum().backward()
    assert attention.grad is not None and attention.grad.isfinite().all()
    alike = attention.detach()[:, :1]
    torch.testing.assert_close(alignment_loss(alike, segments, "code"), alignment_loss(alike[:, 0], segments))


def test_a_wrong_variant_or_map_is_refused():
    segments = torch.ones(1, 1, 4)
    with pytest.raises(ConfigError, match="paper, code"):
        alignment_loss(torch.rand(1, 4), segments, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 axes"):
        alignment_loss(torch.rand(1, 4), segments, "code")
    with pytest.raises(ValueError, match="2 axes"):
        alignment_loss(torch.rand(1, 2, 4), segments)


def test_the_share_inside_is_that_of_the_union():
    maps = torch.tensor([[0.1, 0.2, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0]])
    segments = torch.tensor([[[1.0, 0, 0, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]]])
    torch.testing.assert_close(inside_share(maps, segments), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(inside_share(torch.stack([maps, maps * 3], 1), segments), torch.tensor([0.5, 0.0]))
    assert inside_share(maps, segments[:, :0]).tolist() == [0.0, 0.0]


def test_losses_are_fp32_within_autocast():
    """A training loop of one's own may compute them there."""
    map_BLHN = torch.rand(2, 3, 4, 50, requires_grad=True)
    heads_LH, segments_BKN = torch.rand(3, 4) > 0.5, (torch.rand(2, 3, 50) > 0.7).float()
    expected = alignment_loss(averaged_map(map_BLHN, heads_LH), segments_BKN)
    with torch.autocast("cpu", torch.bfloat16):
        found = alignment_loss(averaged_map(map_BLHN, heads_LH), segments_BKN)
    assert torch.equal(found, expected) and found.dtype == torch.float32
