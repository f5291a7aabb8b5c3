"""Masks to image tokens and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a3tune.vlm.patches import members, paint, token_weights

COORDINATE = st.floats(-6, 18, width=32)


def grid(rows: int, columns: int, patch: float = 4.0) -> np.ndarray:
    """Boxes of a row-major grid that starts at the origin."""
    y, x = np.mgrid[:rows, :columns].reshape(2, -1) * patch
    return np.stack([x, y, x + patch, y + patch], axis=1)


def covered(mask: np.ndarray, box: np.ndarray) -> float:
    """The obvious loop: sum of pixel overlaps over the box's area."""
    x0, y0, x1, y1 = box
    total = 0.0
    for y, x in np.argwhere(mask):
        total += max(0, min(x1, x + 1) - max(x0, x)) * max(0, min(y1, y + 1) - max(y0, y))
    return total / ((x1 - x0) * (y1 - y0))


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return np.array(draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))).reshape(
        height, width
    )


@st.composite
def boxes(draw: st.DrawFn) -> np.ndarray:
    found = []
    for _ in range(draw(st.integers(1, 5))):
        x, y = draw(COORDINATE), draw(COORDINATE)
        found.append([x, y, x + draw(st.floats(0.25, 9)), y + draw(st.floats(0.25, 9))])
    return np.array(found)


@given(masks(), boxes())
def test_weights_equal_the_loop(mask: np.ndarray, found: np.ndarray) -> None:
    expected = [covered(mask, box) for box in found]
    weights = token_weights(mask, found)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected, atol=1e-5)


@given(masks(), st.floats(0.5, 5), st.floats(0.5, 5))
def test_a_grid_over_the_image_keeps_the_masks_area(mask: np.ndarray, dx: float, dy: float) -> None:
    height, width = mask.shape
    x, y = np.arange(0, width + dx, dx), np.arange(0, height + dy, dy)
    found = np.array([[a, b, a + dx, b + dy] for b in y for a in x])
    assert token_weights(mask, found).sum() * dx * dy == pytest.approx(mask.sum(), abs=1e-3)


@given(st.lists(st.booleans(), min_size=12, max_size=12))
def test_token_aligned_masks_survive_the_round_trip(chosen: list[bool]) -> None:
    tokens = np.array(chosen, np.float32)
    found = grid(3, 4)
    picture = paint(tokens, found, (12, 16))
    np.testing.assert_array_equal(members(token_weights(picture > 0.5, found)), tokens)
    np.testing.assert_array_equal(picture, np.kron(tokens.reshape(3, 4), np.ones((4, 4), np.float32)))


def test_several_masks_at_once() -> None:
    stack = np.random.default_rng(0).random((3, 12, 16)) > 0.5
    found = grid(3, 4) + 0.3
    together = token_weights(stack, found)
    assert together.shape == (3, 12)
    for mask, weights in zip(stack, together, strict=True):
        np.testing.assert_array_equal(token_weights(mask, found), weights)


def test_members_follow_the_threshold() -> None:
    weights = np.array([0.0, 0.2, 0.5, 0.9], np.float32)
    np.testing.assert_array_equal(members(weights), [0, 0, 1, 1])
    np.testing.assert_array_equal(members(weights, threshold=0.2), [0, 1, 1, 1])


def test_a_small_lesion_keeps_its_best_token() -> None:
    mask = np.zeros((12, 16), bool)
    mask[5, 6] = True
    chosen = members(token_weights(mask, grid(3, 4)))
    assert chosen.sum() == 1
    assert chosen[5] == 1


def test_a_segment_outside_the_view_has_no_token() -> None:
    mask = np.zeros((12, 20), bool)
    mask[:, 17:] = True
    assert members(token_weights(mask, grid(3, 4))).sum() == 0


def test_overlapping_boxes_are_averaged_and_unseen_pixels_are_zero() -> None:
    found = np.array([[0.0, 0, 4, 4], [2, 0, 6, 4]])
    picture = paint(np.array([1.0, 3.0]), found, (5, 7))
    np.testing.assert_array_equal(picture[0], [1, 1, 2, 2, 3, 3, 0])
    assert not picture[4].any()


def test_a_split_pixel_takes_both_tokens_shares() -> None:
    found = np.array([[0.0, 0, 1.25, 1], [1.25, 0, 2, 1]])
    np.testing.assert_allclose(paint(np.array([4.0, 8.0]), found, (1, 2)), [[4, 0.25 * 4 + 0.75 * 8]], rtol=1e-6)


@given(masks(), boxes())
def test_a_token_without_a_place_takes_and_paints_nothing(mask: np.ndarray, found: np.ndarray) -> None:
    nowhere = np.full((1, 4), np.nan)
    weights = token_weights(mask, np.concatenate([found[:1], nowhere, found[1:]]))
    assert weights[1] == 0
    np.testing.assert_array_equal(np.delete(weights, 1), token_weights(mask, found))
    assert members(weights)[1] == 0
    values = np.arange(len(found), dtype=np.float32)
    picture = paint(np.insert(values, 1, 9), np.concatenate([found[:1], nowhere, found[1:]]), mask.shape)
    np.testing.assert_allclose(picture, paint(values, found, mask.shape), rtol=1e-5)


@given(masks(), boxes())
def test_painting_a_constant_gives_it_back(mask: np.ndarray, found: np.ndarray) -> None:
    picture = paint(np.full(len(found), 2.5), found, mask.shape)
    assert np.all((picture == 0) | np.isclose(picture, 2.5, rtol=1e-4))
