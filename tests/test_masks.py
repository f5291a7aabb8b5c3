import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from a3tune.errors import LabelError
from a3tune.masks import (
    area,
    bounding_box,
    box_iou,
    box_mask,
    decode_mask,
    encode_changes,
    encode_mask,
    mask_iou,
    region_mask,
    suppress,
)
from a3tune.types import Region, Rle

masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40))
corner = st.floats(-20, 60, allow_nan=False)


@settings(deadline=None)
@given(masks)
def test_a_mask_survives_encoding(mask):
    code = encode_mask(mask)
    assert code.size == mask.shape
    assert np.array_equal(decode_mask(code), mask)
    assert area(code) == mask.sum()
    assert encode_changes(np.flatnonzero(np.diff(mask.T.ravel(), prepend=False)), mask.shape) == code


@settings(deadline=None)
@given(masks)
def test_the_bounding_box_is_the_smallest_box_around_the_mask(mask):
    box = bounding_box(encode_mask(mask))
    if not mask.any():
        assert box == (0, 0, 0, 0)
    else:
        rows, columns = np.nonzero(mask)
        assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_long_runs_and_later_differences_are_read_as_written():
    mask = np.random.default_rng(0).random((700, 900)) < 0.001
    assert np.array_equal(decode_mask(encode_mask(mask)), mask)


@settings(deadline=None)
@given(st.text(max_size=12), st.integers(1, 9), st.integers(1, 9))
def test_damaged_counts_are_refused_or_decode_to_the_stated_size(counts, height, width):
    try:
        assert decode_mask(Rle((height, width), counts)).shape == (height, width)
    except LabelError as error:
        assert f"{width} x {height}" in str(error)


@pytest.mark.parametrize("counts", ["", "o", "0", "\0", "é", "ooooooooooo0", "12", "1R1`o"])
def test_counts_that_do_not_fill_the_image_are_refused_by_every_reader(counts):
    for read in (decode_mask, area, bounding_box, lambda code: mask_iou([code], [code])):
        with pytest.raises(LabelError, match="4 x 3"):
            read(Rle((3, 4), counts))


def test_random_counts_never_harm_the_process():
    program = """
import random
from a3tune.errors import LabelError
from a3tune.masks import area, bounding_box, decode_mask
from a3tune.types import Rle
random.seed(1)
for _ in range(5000):
    code = Rle((7, 9), "".join(chr(random.randint(40, 115)) for _ in range(random.randint(0, 12))))
    for read in (decode_mask, area, bounding_box):
        try:
            read(code)
        except LabelError:
            pass
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


@settings(deadline=None)
@given(corner, corner, st.floats(0.01, 60), st.floats(0.01, 60))
def test_a_box_mask_holds_each_pixel_that_the_box_touches(x0, y0, width, height):
    box = (x0, y0, x0 + width, y0 + height)
    touched = np.array(
        [[x < box[2] and x + 1 > box[0] and y < box[3] and y + 1 > box[1] for x in range(30)] for y in range(20)]
    )
    if touched.any():
        assert np.array_equal(box_mask(box, 20, 30), touched)
    else:
        with pytest.raises(LabelError, match="30 x 20"):
            box_mask(box, 20, 30)


def test_a_region_that_does_not_fit_its_image_names_both_sizes():
    mask = encode_mask(np.ones((5, 7), dtype=bool))
    with pytest.raises(LabelError, match=r"'liver'.*70 x 50.*7 x 5"):
        region_mask(Region(mask=mask, name="liver"), 50, 70)
    with pytest.raises(LabelError, match=r"100\.0.*70 x 50"):
        region_mask(Region(box=(100.0, 0.0, 120.0, 9.0)), 50, 70)
    with pytest.raises(LabelError, match="neither"):
        region_mask(Region(), 50, 70)
    assert region_mask(Region(box=(60.0, -5.0, 99.0, 5.0)), 50, 70).sum() == 50
    assert region_mask(Region(mask=mask), 5, 7).all()


@settings(deadline=None)
@given(st.lists(arrays(bool, (6, 8)), min_size=1, max_size=4), st.lists(arrays(bool, (6, 8)), min_size=1, max_size=4))
def test_mask_iou_is_intersection_over_union(first, second):
    iou = mask_iou([encode_mask(mask) for mask in first], [encode_mask(mask) for mask in second])
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            union = (a | b).sum()
            assert iou[i, j] == pytest.approx((a & b).sum() / union if union else 0)


def test_iou_of_nothing_is_an_empty_matrix():
    assert mask_iou([], [encode_mask(np.ones((2, 2)))]).shape == (0, 1)
    assert box_iou(np.zeros((0, 4)), np.zeros((3, 4))).shape == (0, 3)


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 8)] * 4), min_size=2, max_size=6))
def test_box_iou_equals_the_iou_of_the_boxes_masks(corners):
    boxes = np.array([(x, y, x + w + 1, y + h + 1) for x, y, w, h in corners], dtype=float)
    codes = [encode_mask(box_mask(tuple(box), 20, 20)) for box in boxes]
    assert np.allclose(box_iou(boxes, boxes), mask_iou(codes, codes))


@settings(deadline=None)
@given(arrays(float, (7, 7), elements=st.floats(0, 1)), arrays(float, 7, elements=st.integers(0, 3)), st.floats(0, 1))
def test_suppression_equals_the_plain_loop(upper, scores, threshold):
    iou = np.triu(upper, 1) + np.triu(upper, 1).T + np.eye(7)
    expected = []
    for index in sorted(range(7), key=lambda i: (-scores[i], i)):
        if all(iou[index, better] <= threshold for better in expected):
            expected.append(index)
    assert suppress(iou.__getitem__, scores, threshold).tolist() == expected
    assert suppress(iou.__getitem__, scores, threshold, most=2).tolist() == expected[:2]
