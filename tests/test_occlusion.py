"""What is hidden of an image, and what stands in its place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from a3tune.evaluation import occlusion
from a3tune.evaluation.occlusion import FILLINGS, dilate, elsewhere, hidden_parts, occlude


def noisy(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def box(height: int, width: int, rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[rows, columns] = True
    return mask


@pytest.mark.parametrize("filling", FILLINGS)
def test_what_is_not_hidden_stays_and_what_is_hidden_changes(filling):
    image, mask = noisy(30, 40), box(30, 40, slice(5, 15), slice(8, 20))
    before = np.array(image)
    after = np.asarray(occlude(image, mask, filling, seed=1))
    assert np.array_equal(np.asarray(image), before)  # the image itself is left alone
    assert np.array_equal(after[~mask], before[~mask])
    assert (after[mask] != before[mask]).any(-1).mean() > 0.9
    assert np.array_equal(after, np.asarray(occlude(image, mask, filling, seed=1)))
    other = np.asarray(occlude(image, mask, filling, seed=2))
    assert np.array_equal(after, other) == (filling != "noise")


def test_fillings_by_their_definitions():
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:10] = (200, 100, 50)
    mask = box(20, 20, slice(0, 4), slice(0, 20))
    image = Image.fromarray(pixels)
    assert (np.asarray(occlude(image, mask, "mean"))[mask] == (100, 50, 25)).all()
    drawn = np.asarray(occlude(image, mask, "noise"))[mask]
    assert {tuple(pixel) for pixel in drawn.tolist()} == {(0, 0, 0), (200, 100, 50)}
    # A step of 200 grey values behind a Gaussian: its standard deviation is the width at which 16 % are left.
    step = np.zeros((400, 400, 3), np.uint8)
    step[:200] = 200
    blurred = np.asarray(occlude(Image.fromarray(step), np.ones((400, 400), bool), "blur"))[:, 200, 0]
    assert blurred[0] == 200 and blurred[-1] == 0
    assert abs(int(blurred[200 + 20]) - 0.159 * 200) < 4


def test_dilation_is_a_disc_of_a_share_of_the_longer_side():
    mask = box(50, 100, slice(25, 26), slice(50, 51))
    parts = hidden_parts(noisy(50, 100), mask, dilation=0.03)
    y, x = np.mgrid[:50, :100]
    assert np.array_equal(parts["inside"], (y - 25) ** 2 + (x - 50) ** 2 <= 9)
    assert np.array_equal(parts["outside"], ~parts["inside"])
    assert dilate(mask, 0.9) is mask


@given(st.integers(0, 2**16), st.integers(8, 40), st.integers(8, 40))
def test_elsewhere_is_as_large_and_somewhere_else(seed, height, width):
    random = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    for _ in range(random.integers(1, 3)):
        y, x = random.integers(height), random.integers(width)
        mask[y : y + random.integers(1, height), x : x + random.integers(1, width)] = True
    place = elsewhere(np.asarray(noisy(height, width, seed)), mask)
    free = [
        (down, right)
        for down in range(height)
        for right in range(width)
        if not (np.roll(mask, (down, right), (0, 1)) & mask).any()
    ]
    assert (place is None) == (not free)
    if place is not None:
        assert place.sum() == mask.sum() and not (place & mask).any()


def test_elsewhere_looks_for_what_is_like_the_region():
    pixels = np.zeros((60, 60, 3), np.uint8)  # an empty margin
    pixels[20:40] = np.random.default_rng(0).integers(0, 255, (20, 60, 3))
    place = elsewhere(pixels, box(60, 60, slice(25, 35), slice(10, 20)))
    assert place is not None and place[20:40].sum() == 100


def test_large_images_are_searched_in_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(occlusion, "_SEARCHED", 16)
    mask = box(50, 70, slice(11, 23), slice(31, 40))
    place = elsewhere(np.asarray(noisy(50, 70)), mask)
    assert place is not None and place.shape == mask.shape
    assert not (place & mask).any() and place.sum() == mask.sum()


@given(st.integers(0, 2**16), st.integers(17, 90), st.integers(17, 90))
def test_in_blocks_too_all_of_the_region_is_hidden_elsewhere(seed, height, width):
    random = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    y, x = random.integers(height), random.integers(width)
    mask[y : y + random.integers(1, height), x : x + random.integers(1, width)] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(occlusion, "_SEARCHED", 16)
        place = elsewhere(np.asarray(noisy(height, width, seed)), mask)
    if place is not None:
        assert place.sum() == mask.sum() and not (place & mask).any()
    block = -(-max(height, width) // 16)
    rows, columns = mask.any(1).sum(), mask.any(0).sum()
    if rows + 4 * block <= height / 2 or columns + 4 * block <= width / 2:
        assert place is not None, "there is room"


def test_a_region_that_fills_the_image_has_no_elsewhere():
    assert set(hidden_parts(noisy(20, 20), np.ones((20, 20), bool))) == {"inside", "outside"}
