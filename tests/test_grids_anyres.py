"""Boxes of LLaVA-NeXT and LLaVA-OneVision against their image processors and the models' own order of tokens."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    LlavaNextImageProcessorPil,
    LlavaNextModel,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionModel,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from a3tune.errors import ModelError
from a3tune.vlm.grids.anyres import llava_next_boxes, llava_onevision_boxes
from a3tune.vlm.patches import token_weights

PATCH, SIDE = 7, 4
NEXT_TILE, ONEVISION_TILE = PATCH * SIDE, PATCH * SIDE + 2
NEXT = LlavaNextImageProcessorPil(
    size={"shortest_edge": NEXT_TILE},
    crop_size={"height": NEXT_TILE, "width": NEXT_TILE},
    image_grid_pinpoints=[[NEXT_TILE * y, NEXT_TILE * x] for y, x in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))],
)
ONEVISION = LlavaOnevisionImageProcessorPil(
    size={"height": ONEVISION_TILE, "width": ONEVISION_TILE},
    image_grid_pinpoints=[[ONEVISION_TILE * y, ONEVISION_TILE * x] for y in range(1, 6) for x in range(1, 6)],
)
FAMILIES = {
    "llava_next": (llava_next_boxes, NEXT, LlavaNextModel, {"vision_feature_select_strategy": "default"}),
    "llava_onevision": (llava_onevision_boxes, ONEVISION, LlavaOnevisionModel, {"vision_aspect_ratio": "anyres_max_4"}),
}


def config_of(images: Any) -> SimpleNamespace:
    vision = SimpleNamespace(image_size=NEXT_TILE if images is NEXT else ONEVISION_TILE, patch_size=PATCH)
    return SimpleNamespace(
        vision_config=vision, image_grid_pinpoints=images.image_grid_pinpoints, vision_aspect_ratio="anyres_max_4"
    )


def boxes_of(name: str, height: int, width: int) -> np.ndarray:
    boxes, images, *_ = FAMILIES[name]
    processor = SimpleNamespace(
        image_processor=images, num_additional_image_tokens=1, vision_feature_select_strategy="default"
    )
    return boxes(config_of(images), processor, height, width)


def change(name: str, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """How much each token's pixels change, in the order in which the model packs its tokens; NaN at row ends."""
    _, images, model, options = FAMILIES[name]
    seen = [images(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0] for picture in (before, after)]
    used = SIDE * PATCH
    patches = (seen[1] - seen[0]).abs().sum(1)[:, :used, :used].unflatten(2, (SIDE, PATCH)).unflatten(1, (SIDE, PATCH))
    features = patches.sum((2, 4)).flatten(1)[..., None]
    packed, _ = model.pack_image_features(
        SimpleNamespace(config=config_of(images)),
        [features],
        torch.tensor([before.shape[:2]]),
        image_newline=torch.tensor([torch.nan]),
        **options,
    )
    return packed[0].flatten().numpy()


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(st.integers(20, 400), st.integers(20, 400), st.integers(0, 10**6))
@example(400, 20, 31)
@example(20, 400, 31)
@example(61, 59, 20)
def test_painting_a_tokens_box_changes_that_tokens_pixels(name: str, height: int, width: int, pick: int) -> None:
    found = boxes_of(name, height, width)
    inside = np.clip(found, 0, [width, height, width, height])
    whole = np.flatnonzero((np.abs(inside - found) < 0.01).all(1))
    token = whole[pick % len(whole)]
    x0, y0, x1, y1 = np.round(inside[token]).astype(int)
    assume(min(x1 - x0, y1 - y0) >= 4)
    black = np.zeros((height, width, 3), np.uint8)
    painted = black.copy()
    painted[y0:y1, x0:x1] = 255
    changed = change(name, black, painted)
    assert np.array_equal(np.isnan(changed), np.isnan(found[:, 0]))
    covered = token_weights(painted[..., 0] > 0, found)
    # Of a small box whole pixels cover less.
    assert covered[np.nanargmax(changed)] > min(0.75, 0.99 * covered[token])
    assert changed[token] > 0.75 * np.nanmax(changed)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1000), st.integers(1, 1000))
@example(1, 1000)
@example(1000, 1)
def test_there_is_a_box_for_every_token_at_any_size(name: str, height: int, width: int) -> None:
    _, images, model, options = FAMILIES[name]
    config = config_of(images)
    tiles = image_size_to_num_patches((height, width), images.image_grid_pinpoints, config.vision_config.image_size)
    packed, _ = model.pack_image_features(
        SimpleNamespace(config=config),
        [torch.zeros(tiles, SIDE**2, 1)],
        torch.tensor([[height, width]]),
        image_newline=torch.tensor([torch.nan]),
        **options,
    )
    found = boxes_of(name, height, width)
    assert np.array_equal(np.isnan(found[:, 0]), packed[0].flatten().isnan().numpy())


def test_tiles_of_another_size_than_the_towers_are_refused() -> None:
    config = config_of(NEXT)
    config.vision_config.image_size = 56
    processor = SimpleNamespace(
        image_processor=NEXT, num_additional_image_tokens=1, vision_feature_select_strategy="default"
    )
    with pytest.raises(ModelError, match="cuts tiles of 28 pixels, but the vision tower takes 56"):
        llava_next_boxes(config, processor, 60, 60)
