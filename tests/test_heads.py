"""The visual attention ratio and the choice of heads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a3tune.attention.heads import HeadSelector, head_count, overlap, visual_ratio, votes
from a3tune.errors import ConfigError

ALL = torch.tensor([True])


def ratios(*scores: list[list[float]]) -> torch.Tensor:
    return torch.tensor(scores)


def chosen(mask: torch.Tensor) -> list[list[int]]:
    return mask.nonzero().tolist()


def test_ratio_is_a_share_and_zero_where_nothing_is_seen():
    attention = torch.tensor([[[[0.1, 0.3], [0.0, 0.0]]]], requires_grad=True)
    mass = torch.tensor([[[0.8, 0.0]]], requires_grad=True)
    ratio = visual_ratio(attention, mass)
    torch.testing.assert_close(ratio, torch.tensor([[[0.5, 0.0]]]))
    ratio.sum().backward()
    assert attention.grad is not None and mass.grad is not None
    torch.testing.assert_close(attention.grad[0, 0], torch.tensor([[1.25, 1.25], [0.0, 0.0]]))
    assert mass.grad.isfinite().all() and mass.grad[0, 0, 1] == 0


def test_the_heads_with_the_highest_mean_ratio_are_chosen():
    ratio = ratios([[0.9, 0.1], [0.2, 0.3]], [[0.1, 0.2], [0.3, 0.9]])
    mask = HeadSelector(2).select(ratio, torch.tensor([True, True]))
    assert mask.dtype == torch.bool and chosen(mask) == [[0, 0], [1, 1]]


def test_uncounted_samples_do_not_vote():
    ratio = ratios([[0.9, 0.1], [0.2, 0.3]], [[0.0, 5.0], [5.0, 0.0]])
    assert chosen(HeadSelector(1).select(ratio, torch.tensor([True, False]))) == [[0, 0]]
    assert not HeadSelector(1).select(ratio, torch.tensor([False, False])).any()


def test_ratios_per_group_are_averaged_without_the_padding():
    ratio = torch.tensor([[[[0.6, 0.2]]], [[[0.4, 0.0]]]])
    torch.testing.assert_close(votes(ratio, torch.tensor([True, True])), torch.tensor([[[0.4]], [[0.4]]]))
    many = torch.rand(3, 2, 4, 5)
    counted = torch.ones(3, dtype=torch.bool)
    assert torch.equal(HeadSelector(3).select(many, counted), HeadSelector(3).select(many.mean(-1), counted))


@pytest.mark.parametrize(
    ("heads", "count"),
    [
        *[(1, 1), (5, 5), (8, 8), (0.5, 4), (0.3, 2), (0.001, 1)],
        *[("100%", 8), ("100.0%", 8), ("50%", 4), ("12.5%", 1), (".1%", 1)],
    ],
)
def test_an_integer_is_a_number_and_percent_or_a_fraction_a_share(heads, count):
    assert HeadSelector(heads).select(torch.rand(1, 2, 4), ALL).sum() == count
    assert head_count(heads, 8) == count


@given(st.integers(1, 10**6), st.integers(1, 2000))
def test_a_share_means_the_same_in_percent_and_as_a_fraction(millionths, total):
    fraction = millionths / 10**6
    as_fraction = total if fraction == 1 else head_count(fraction, total)
    assert abs(head_count(f"{millionths / 10**4:f}%", total) - as_fraction) <= (fraction * total % 1 == 0.5)


@given(st.integers(1, 5), st.integers(1, 5), st.data())
@settings(max_examples=50, deadline=None)
def test_exactly_r_heads_none_worse_than_one_left_out(layers, heads, data):
    count = data.draw(st.integers(1, layers * heads))
    values = data.draw(st.lists(st.integers(0, 3), min_size=layers * heads, max_size=layers * heads))
    ratio = torch.tensor(values, dtype=torch.float32).view(1, layers, heads)
    mask = HeadSelector(count).select(ratio, ALL)
    assert mask.sum() == count
    left_out = ratio[0][~mask]
    assert not len(left_out) or ratio[0][mask].min() >= left_out.max()
    assert torch.equal(mask, HeadSelector(count).select(ratio, ALL))


def test_too_many_heads_name_the_maximum():
    with pytest.raises(ConfigError, match=r"at most 8, .* got 9"):
        HeadSelector(9).select(torch.rand(1, 2, 4), ALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "set the loss weight to 0"),
        ({"heads": 1.0}, "write 1 for one head, or 100% for all"),
        ({"heads": 1.5}, "> 0 and < 1, got 1.5"),
        ({"heads": -0.1}, "> 0 and < 1, got -0.1"),
        ({"heads": "0%"}, "at most 100%"),
        ({"heads": "101%"}, "at most 100%"),
        ({"heads": "50"}, 'got "50"'),
        ({"heads": True}, "got true"),
        ({"heads": 1, "mode": "mean"}, "batch, running, fixed"),
        ({"heads": 1, "momentum": 1.0}, "momentum"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        HeadSelector(**arguments)


def test_running_average_and_its_state():
    first, second = ratios([[1.0, 0.0]]), ratios([[0.0, 1.5]])
    selector = HeadSelector(1, "running", momentum=0.75)
    assert not selector.select(first, torch.tensor([False])).any() and selector.state_dict() == {}
    assert chosen(selector.select(first, ALL)) == [[0, 0]]
    assert chosen(selector.select(second, ALL)) == [[0, 0]]
    (score,) = selector.state_dict().values()
    torch.testing.assert_close(score, torch.tensor([[0.75, 0.375]]))
    selector.select(first, torch.tensor([False]))
    assert torch.equal(selector.state_dict()["score_LH"], score)
    resumed = HeadSelector(1, "running", momentum=0.75)
    resumed.load_state_dict(selector.state_dict())
    assert chosen(resumed.select(second, ALL)) == chosen(selector.select(second, ALL)) == [[0, 1]]
    assert torch.equal(resumed.state_dict()["score_LH"], selector.state_dict()["score_LH"])


def test_fixed_heads_do_not_follow_the_batch():
    selector = HeadSelector(1, "fixed")
    ratio = ratios([[0.1, 0.9], [0.2, 0.3]])
    with pytest.raises(ConfigError, match="calibrate"):
        selector.select(ratio, ALL)
    selector.calibrate(torch.tensor([[0.1, 0.2], [0.9, 0.3]]))
    assert chosen(selector.select(ratio, ALL)) == chosen(selector.select(ratio, torch.tensor([False]))) == [[1, 0]]
    with pytest.raises(ConfigError, match="2 layers of 2 heads, but the model has 1 layers of 2"):
        selector.select(ratio[:, :1], ALL)
    with pytest.raises(ConfigError, match="samples that have an image"):
        selector.calibrate(torch.full((2, 2), torch.nan))


def test_a_given_list_of_heads():
    selector = HeadSelector(2, "fixed")
    selector.fix([(1, 1), (0, 0)], (2, 2))
    assert chosen(selector.select(torch.rand(1, 2, 2), ALL)) == [[0, 0], [1, 1]]
    for pairs, message in (
        ([(2, 0), (0, 0)], r"got \(2, 0\)"),
        ([(0, 0)], "expected 2 different .* got 1"),
        ([(0, 0), (0, 0)], "expected 2 different .* got 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            selector.fix(pairs, (2, 2))


def test_selection_carries_no_gradient():
    ratio = torch.rand(1, 2, 4, requires_grad=True)
    selector = HeadSelector(2, "running")
    assert not selector.select(ratio, ALL).requires_grad
    assert not selector.state_dict()["score_LH"].requires_grad


def test_overlap_is_the_share_of_heads_kept():
    previous = torch.tensor([[True, True], [True, True]])
    current = torch.tensor([[True, False], [False, False]])
    assert overlap(previous, current) == 0.25
    assert overlap(current, previous) == 1.0
    assert overlap(torch.zeros(2, 2, dtype=torch.bool), current) == 0.0
