"""Boxes of image tokens against the real image processors."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from a3tune.errors import ModelError
from a3tune.vlm.grids.llava import llava_boxes

PATCH = 12
VIEW = 60
CLIP = CLIPImageProcessorPil(size={"shortest_edge": VIEW}, crop_size={"height": VIEW, "width": VIEW})
EXACT = CLIPImageProcessorPil(size={"height": VIEW, "width": VIEW}, do_center_crop=False)
SMALL = CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size={"height": VIEW, "width": VIEW})
PADDED = LlavaImageProcessorPil(
    size={"shortest_edge": VIEW}, crop_size={"height": VIEW, "width": VIEW}, do_pad=True, image_mean=[0.5] * 3
)
CROP_ONLY = CLIPImageProcessorPil(do_resize=False, crop_size={"height": VIEW, "width": VIEW})
RAGGED = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
PROCESSORS = {"clip": CLIP, "exact": EXACT, "small": SMALL, "padded": PADDED, "crop only": CROP_ONLY, "ragged": RAGGED}


def boxes_of(images: object, height: int, width: int, patch: int = PATCH, **processor: object) -> np.ndarray:
    settings = {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default", **processor}
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=patch, model_type="pixtral"))
    return llava_boxes(config, SimpleNamespace(image_processor=images, **settings), height, width)


def patch_change(images: object, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """How much the processor's output changes in every patch, row-major."""
    seen = [images(Image.fromarray(picture), return_tensors="np")["pixel_values"][0] for picture in (before, after)]
    change = np.abs(seen[1] - seen[0]).sum(0)
    rows, columns = change.shape[0] // PATCH, change.shape[1] // PATCH
    change = change[: rows * PATCH, : columns * PATCH]
    return change.reshape(rows, PATCH, columns, PATCH).sum((1, 3)).ravel()


@pytest.mark.parametrize("name", PROCESSORS)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(0, 10**6))
@example(1, 1, 0)
@example(150, 61, 12)
@example(61, 150, 17)
@example(60, 60, 7)
def test_painting_a_tokens_box_changes_that_tokens_patch(name: str, height: int, width: int, pick: int) -> None:
    images = PROCESSORS[name]
    found = boxes_of(images, height, width)
    inside = np.clip(found, 0, [width, height, width, height])
    whole = np.flatnonzero(((inside[:, 2:] - inside[:, :2]) >= 0.99 * (found[:, 2:] - found[:, :2])).all(1))
    if len(whole) == 0:
        return
    token = whole[pick % len(whole)]
    x0, y0, x1, y1 = np.round(inside[token]).astype(int)
    if x1 - x0 < 2 or y1 - y0 < 2:  # smaller than what one can paint
        return
    black = np.zeros((height, width, 3), np.uint8)
    painted = black.copy()
    painted[y0:y1, x0:x1] = 255
    change = patch_change(images, black, painted)
    assert len(change) == len(found)
    assert change.argmax() == token


@pytest.mark.parametrize("name", PROCESSORS)
@given(st.integers(1, 400), st.integers(1, 400))
def test_boxes_tile_the_view_row_by_row(name: str, height: int, width: int) -> None:
    found = boxes_of(PROCESSORS[name], height, width)
    side = round(len(found) ** 0.5)
    table = found.reshape(side, side, 4)
    np.testing.assert_allclose(table[:, 1:, 0], table[:, :-1, 2])
    np.testing.assert_allclose(table[1:, :, 1], table[:-1, :, 3])
    assert (found[:, 2:] > found[:, :2]).all()


@given(st.integers(1, 60), st.integers(1, 60))
def test_the_longer_side_is_rounded_as_the_processor_does(height: int, width: int) -> None:
    images = CLIPImageProcessorPil(size={"shortest_edge": 7}, do_center_crop=False)
    seen = images(Image.new("RGB", (width, height)), return_tensors="np")["pixel_values"][0]
    found = boxes_of(images, height, width, patch=1)
    assert len(found) == seen.shape[1] * seen.shape[2]
    np.testing.assert_allclose([found[0, :2], found[-1, 2:]], [[0, 0], [width, height]])


def test_the_crop_drops_the_sides_and_padding_keeps_them() -> None:
    assert boxes_of(CLIP, 60, 120)[:, [0, 2]].min() == 30
    assert boxes_of(CLIP, 60, 120)[:, [0, 2]].max() == 90
    padded = boxes_of(PADDED, 60, 120)
    np.testing.assert_allclose([padded[:, 0].min(), padded[:, 2].max()], [0, 120])
    np.testing.assert_allclose([padded[:, 1].min(), padded[:, 3].max()], [-30, 90])


def test_the_backends_round_half_a_pixel_of_padding_differently() -> None:
    assert boxes_of(CROP_ONLY, 59, 59)[0, 0] == -1
    torchvision = SimpleNamespace(
        backend="torchvision", do_resize=False, do_center_crop=True, crop_size={"height": VIEW, "width": VIEW}
    )
    assert boxes_of(torchvision, 59, 59)[0, 0] == 0


def test_tokens_that_are_no_patches_are_refused() -> None:
    with pytest.raises(ModelError, match=r"\+1 image tokens beside the patches"):
        boxes_of(CLIP, 60, 60, vision_feature_select_strategy="full")


def test_an_unknown_resize_is_refused() -> None:
    images = CLIPImageProcessorPil(size={"shortest_edge": 60, "longest_edge": 90})
    with pytest.raises(ModelError, match="longest_edge"):
        boxes_of(images, 60, 60)
