"""Boxes of PaliGemma and Gemma 3, with pan and scan, against the real image processors."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Gemma3ImageProcessorPil, SiglipImageProcessorPil

from a3tune.vlm.grids.square import gemma3_boxes, paligemma_boxes
from a3tune.vlm.patches import token_weights

VIEW, SIDE = 56, 4
CONFIG = SimpleNamespace(vision_config=SimpleNamespace(image_size=VIEW, patch_size=7), mm_tokens_per_image=SIDE**2)
COARSE = SimpleNamespace(vision_config=SimpleNamespace(image_size=VIEW, patch_size=VIEW // SIDE))
SQUARE = {"height": VIEW, "width": VIEW}
PAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 30,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
PROCESSORS: dict[str, Any] = {
    "paligemma": (paligemma_boxes, COARSE, SiglipImageProcessorPil(size=SQUARE)),
    "gemma3": (gemma3_boxes, CONFIG, Gemma3ImageProcessorPil(size=SQUARE, do_pan_and_scan=False)),
    "pan and scan": (gemma3_boxes, CONFIG, Gemma3ImageProcessorPil(size=SQUARE, **PAN)),
}


def boxes_of(name: str, height: int, width: int, **processor: Any) -> np.ndarray:
    boxes, config, images = PROCESSORS[name]
    return boxes(config, SimpleNamespace(image_processor=images, **processor), height, width)


def blocks(name: str, picture: np.ndarray) -> np.ndarray:
    """Pixels of each token, view by view: `[N, values]`."""
    pixels = np.stack(PROCESSORS[name][2](Image.fromarray(picture), return_tensors="np")["pixel_values"])
    block = VIEW // SIDE
    return pixels.reshape(-1, 3, SIDE, block, SIDE, block).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3 * block**2)


@pytest.mark.parametrize("name", PROCESSORS)
@settings(max_examples=40, deadline=None)
@given(st.integers(8, 300), st.integers(8, 300), st.integers(0, 10**6))
@example(40, 300, 3 * SIDE**2)
@example(300, 40, 3 * SIDE**2)
@example(100, 151, SIDE**2 + 5)
@example(61, 35, 20)
def test_painting_a_tokens_box_changes_that_tokens_pixels(name: str, height: int, width: int, pick: int) -> None:
    found = boxes_of(name, height, width)
    token = pick % len(found)
    x0, y0, x1, y1 = np.round(found[token]).astype(int)
    assume(min(x1 - x0, y1 - y0) >= 4)
    black = np.zeros((height, width, 3), np.uint8)
    painted = black.copy()
    painted[y0:y1, x0:x1] = 255
    changed = np.abs(blocks(name, painted) - blocks(name, black)).sum(1)
    assert len(changed) == len(found)
    covered = token_weights(painted[..., 0] > 0, found)
    assert covered[changed.argmax()] > 0.75
    assert changed[token] > 0.75 * changed.max()


@pytest.mark.parametrize("name", PROCESSORS)
@given(st.integers(1, 300), st.integers(1, 300))
def test_the_first_view_is_the_whole_image(name: str, height: int, width: int) -> None:
    first = boxes_of(name, height, width)[: SIDE**2]
    np.testing.assert_allclose([*first[0, :2], *first[-1, 2:]], [0, 0, width, height])
    np.testing.assert_allclose(token_weights(np.ones((height, width), bool), first), 1, rtol=1e-4)


@given(st.integers(1, 500), st.integers(1, 500))
@example(40, 100)
@example(100, 40)
@example(31, 500)
def test_there_are_as_many_crops_as_the_processor_makes(height: int, width: int) -> None:
    images = PROCESSORS["pan and scan"][2]
    settings = {name: value for name, value in PAN.items() if name != "do_pan_and_scan"}
    crops = images.pan_and_scan(np.zeros((3, height, width), np.uint8), **settings)
    views = boxes_of("pan and scan", height, width).reshape(-1, SIDE**2, 4)[1:]
    sizes = [(view[-1, 3] - view[0, 1], view[-1, 2] - view[0, 0]) for view in views]
    np.testing.assert_allclose(np.reshape(sizes, (-1, 2)), np.reshape([crop.shape[1:] for crop in crops], (-1, 2)))


def test_the_processors_own_settings_go_before_those_of_its_image_processor() -> None:
    assert len(boxes_of("pan and scan", 40, 200)) > SIDE**2
    assert len(boxes_of("pan and scan", 40, 200, images_kwargs={"do_pan_and_scan": False})) == SIDE**2
