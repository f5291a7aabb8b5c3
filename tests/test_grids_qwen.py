"""Boxes of the Qwen families against their processor and, through tiny models, their features."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from a3tune.errors import DataError
from a3tune.vlm.encode import prepare
from a3tune.vlm.grids import token_boxes
from a3tune.vlm.grids.qwen import qwen_boxes
from a3tune.vlm.load import Vlm, load_vlm
from zoo.qwen import LIMITS, MERGE, MODELS, PATCH

BLOCK = PATCH * MERGE
RESIZED = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=LIMITS)
AS_IS = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=LIMITS, do_resize=False)
SIDES = st.integers(1, 300)


def boxes_of(images: Any, height: int, width: int) -> np.ndarray:
    return qwen_boxes(None, SimpleNamespace(image_processor=images), height, width)


def seen_by_token(images: Any, picture: np.ndarray) -> np.ndarray:
    """What of the image reaches each token: its block of patches, `[N, values]`."""
    pixels = images(Image.fromarray(picture), return_tensors="np")["pixel_values"]
    return pixels.reshape(len(pixels) // MERGE**2, -1)


def picture_pair(height: int, width: int, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A dark image, and the same with a bright box."""
    x0, y0, x1, y1 = np.round(box).astype(int)
    dark = np.full((height, width, 3), 20, np.uint8)
    bright = dark.copy()
    bright[y0:y1, x0:x1] = 250
    return dark, bright


@settings(deadline=None)
@given(SIDES, SIDES)
@example(1, 200)
@example(300, 2)
@example(64, 64)
def test_there_is_one_box_per_token_and_they_tile_the_image(height: int, width: int) -> None:
    assume(max(height, width) / min(height, width) <= 200)
    found = boxes_of(RESIZED, height, width)
    _, rows, columns = RESIZED(Image.new("RGB", (width, height)), return_tensors="np")["image_grid_thw"][0] // [1, 2, 2]
    table = found.reshape(rows, columns, 4)
    np.testing.assert_allclose(table[:, 1:, 0], table[:, :-1, 2])
    np.testing.assert_allclose(table[1:, :, 1], table[:-1, :, 3])
    np.testing.assert_allclose([*table[0, 0, :2], *table[-1, -1, 2:]], [0, 0, width, height])


@pytest.mark.parametrize("images", [RESIZED, AS_IS], ids=["resized", "as is"])
@settings(deadline=None)
@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 63))
def test_without_resampling_a_painted_box_changes_exactly_its_token(
    images: Any, rows: int, columns: int, pick: int
) -> None:
    height, width, token = rows * BLOCK, columns * BLOCK, pick % (rows * columns)
    dark, bright = (
        seen_by_token(images, picture)
        for picture in picture_pair(height, width, boxes_of(images, height, width)[token])
    )
    assert len(dark) == rows * columns
    assert np.flatnonzero((dark != bright).any(1)).tolist() == [token]
    assert (dark[token] != bright[token]).all()


@settings(deadline=None, max_examples=50)
@given(SIDES, SIDES, st.integers(0, 10**6))
@example(300, 37, 5)
@example(33, 290, 30)
def test_a_painted_box_changes_its_token_most(height: int, width: int, pick: int) -> None:
    assume(max(height, width) / min(height, width) <= 200)
    found = boxes_of(RESIZED, height, width)
    token = pick % len(found)
    assume((found[token, 2:] - found[token, :2] >= 2).all())
    dark, bright = (seen_by_token(RESIZED, picture) for picture in picture_pair(height, width, found[token]))
    assert np.abs(bright - dark).sum(1).argmax() == token


def test_an_image_too_long_and_thin_is_refused() -> None:
    with pytest.raises(DataError, match="image of 1 x 201 pixels"):
        boxes_of(RESIZED, 201, 1)


def test_a_sample_with_such_an_image_is_refused(vlm: Vlm) -> None:
    with pytest.raises(DataError, match="images of 1 x 201 pixels: the model's processor refuses them"):
        prepare(vlm, [Image.new("RGB", (1, 201))], "What?")


@pytest.fixture(scope="module", params=MODELS)
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    folder: Path = tmp_path_factory.mktemp(request.param)
    MODELS[request.param](folder)
    return load_vlm(folder, device="cpu")


def features(vlm: Vlm, picture: np.ndarray) -> torch.Tensor:
    inputs = vlm.processor.image_processor(Image.fromarray(picture), return_tensors="pt")
    with torch.no_grad():
        return torch.cat(vlm.model.model.get_image_features(**inputs).pooler_output)


def test_a_painted_box_changes_its_tokens_feature_most(vlm: Vlm) -> None:
    height, width = 40, 56  # windows of 2 x 2 tokens do not fill it: Qwen2.5 has to sort them back
    found = token_boxes(vlm, height, width)
    assert len(found) == 5 * 7
    for token, box in enumerate(found):
        dark, bright = (features(vlm, picture) for picture in picture_pair(height, width, box))
        assert (bright - dark).norm(dim=-1).argmax() == token


def test_the_prompt_holds_one_token_per_box(vlm: Vlm) -> None:
    for height, width in [(20, 20), (30, 190), (333, 111)]:
        inputs = vlm.processor(text=["<|image_pad|>"], images=[Image.new("RGB", (width, height))], return_tensors="pt")
        count = int((inputs["input_ids"] == vlm.model.config.image_token_id).sum())
        assert count == len(token_boxes(vlm, height, width))
