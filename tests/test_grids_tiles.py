"""Boxes of Idefics3, SmolVLM and InternVL against their processors and, through tiny models, their features."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Idefics3ImageProcessorPil, SmolVLMImageProcessorPil

from a3tune.errors import ModelError
from a3tune.vlm.grids import token_boxes
from a3tune.vlm.grids.tiles import idefics_boxes, internvl_boxes
from a3tune.vlm.load import Vlm, load_vlm
from zoo.tiles import MODELS, PATCH, SIDE, TILE, idefics_processor, internvl_processor

BLOCK = TILE // SIDE
SIDES = st.integers(1, 400)
PICKS = st.integers(0, 10**6)
IDEFICS_CONFIG = SimpleNamespace(vision_config=SimpleNamespace(patch_size=PATCH), scale_factor=2)
INTERNVL_CONFIG = SimpleNamespace(vision_config=SimpleNamespace(patch_size=[PATCH, PATCH]), downsample_ratio=0.5)
IDEFICS = {
    "idefics3": Idefics3ImageProcessorPil(size={"longest_edge": 3 * TILE}),
    "smolvlm": SmolVLMImageProcessorPil(size={"longest_edge": 4 * TILE}),
    "ragged": Idefics3ImageProcessorPil(size={"longest_edge": 101}),
    "small": Idefics3ImageProcessorPil(size={"longest_edge": 20}),
    "exact": Idefics3ImageProcessorPil(size={"height": 50, "width": 70}),
    "as is": Idefics3ImageProcessorPil(do_resize=False),
    "one tile": Idefics3ImageProcessorPil(do_image_splitting=False),
}
INTERNVL = {"internvl": (1, 6), "never cut": (1, 1), "always cut": (4, 12)}
PROCESSORS: dict[str, Any] = {f"idefics, {name}": idefics_processor(images) for name, images in IDEFICS.items()}
PROCESSORS |= {f"internvl, {name}": internvl_processor(*limits) for name, limits in INTERNVL.items()}


def boxes_of(processor: Any, height: int, width: int) -> np.ndarray:
    if hasattr(processor, "image_seq_len"):
        return idefics_boxes(IDEFICS_CONFIG, processor, height, width)
    return internvl_boxes(INTERNVL_CONFIG, processor, height, width)


def seen_by_token(processor: Any, picture: np.ndarray) -> np.ndarray:
    """What of the image reaches each token: its block of its tile, `[N, values]`."""
    inputs = processor(text=[processor.image_token], images=[Image.fromarray(picture)], return_tensors="np")
    pixels = inputs["pixel_values"].reshape(-1, 3, SIDE, BLOCK, SIDE, BLOCK)
    assert pixels.shape[0] * SIDE**2 == (inputs["input_ids"] == processor.image_token_id).sum()
    return pixels.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3 * BLOCK**2)


def picture_pair(height: int, width: int, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A dark image, and the same with a bright box."""
    x0, y0, x1, y1 = np.round(box).astype(int)
    dark = np.full((height, width, 3), 20, np.uint8)
    bright = dark.copy()
    bright[y0:y1, x0:x1] = 250
    return dark, bright


def same_view(token: int, count: int) -> slice:
    """The tokens of the picture that shows a token at its own scale: the tiles, or the whole image that comes last."""
    last = count - SIDE**2
    return slice(0, last) if token < last else slice(last, count)


@pytest.mark.parametrize("name", PROCESSORS)
@settings(deadline=None, max_examples=25)
@given(SIDES, SIDES)
@example(1, 400)
@example(400, 3)
@example(TILE, TILE)
@example(TILE + 1, TILE)
def test_there_is_one_box_per_token_and_both_views_tile_the_image(name: str, height: int, width: int) -> None:
    found = boxes_of(PROCESSORS[name], height, width)
    assert len(found) == len(seen_by_token(PROCESSORS[name], np.zeros((height, width, 3), np.uint8)))
    views = [found[same_view(token, len(found))] for token in {0, len(found) - 1}]
    for view in views:
        centre = (view[:, :2] + view[:, 2:]) / 2
        assert len(np.unique(centre.round(6), axis=0)) == len(view)
        np.testing.assert_allclose((view[:, 2:] - view[:, :2]).prod(1).sum(), height * width)
        np.testing.assert_allclose([*view[:, :2].min(0), *view[:, 2:].max(0)], [0, 0, width, height], atol=1e-9)


@pytest.mark.parametrize("name", ["idefics, idefics3", "idefics, as is", "internvl, always cut"])
@settings(deadline=None, max_examples=30)
@given(PICKS)
def test_without_resampling_a_painted_box_changes_exactly_the_tokens_that_see_it(name: str, pick: int) -> None:
    height, width = 2 * TILE, 3 * TILE
    found = boxes_of(PROCESSORS[name], height, width)
    assert len(found) == (2 * 3 + 1) * SIDE**2
    token, tiles = pick % len(found), len(found) - SIDE**2
    pair = picture_pair(height, width, found[token])
    dark, bright = (seen_by_token(PROCESSORS[name], picture) for picture in pair)
    overlap = np.minimum(found[token, 2:], found[:tiles, 2:]) - np.maximum(found[token, :2], found[:tiles, :2])
    assert (dark != bright).any(1)[:tiles].tolist() == (overlap > 0).all(1).tolist()
    if token < tiles:
        assert (overlap > 0).all(1).sum() == 1
        assert (dark[token] != bright[token]).all()


# "small" squeezes the image to 20 pixels before it cuts it into 32: what a token sees is blurred beyond its box, as it
# is along the short sides of very long images.
@pytest.mark.parametrize("name", [name for name in PROCESSORS if name != "idefics, small"])
@settings(deadline=None, max_examples=15)
@given(SIDES, SIDES, PICKS)
@example(400, 75, 5)
@example(53, 290, 30)
@example(64, 96, 95)
def test_a_painted_box_changes_its_token_most(name: str, height: int, width: int, pick: int) -> None:
    assume(max(height, width) <= 6 * min(height, width))
    found = boxes_of(PROCESSORS[name], height, width)
    token = pick % len(found)
    assume((found[token, 2:] - found[token, :2] >= 2).all())
    pair = picture_pair(height, width, found[token])
    dark, bright = (seen_by_token(PROCESSORS[name], picture) for picture in pair)
    view = same_view(token, len(found))
    assert np.abs(bright - dark).sum(1)[view].argmax() == token - view.start


@pytest.mark.parametrize("name", ["idefics, idefics3", "internvl, internvl"])
def test_a_processor_that_writes_other_tokens_than_the_model_makes_is_refused(name: str) -> None:
    images = PROCESSORS[name].image_processor
    wrong = SimpleNamespace(image_processor=images, image_seq_len=169)
    other = SimpleNamespace(image_processor=images, image_seq_length=256)
    with pytest.raises(ModelError, match="a tile of 32 pixels cut into blocks of 8 gives 4 x 4 tokens"):
        boxes_of(wrong if name.startswith("idefics") else other, 50, 50)


@pytest.fixture(scope="module", params=MODELS)
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    folder: Path = tmp_path_factory.mktemp(request.param)
    MODELS[request.param](folder)
    return load_vlm(folder, device="cpu")


def features(vlm: Vlm, picture: np.ndarray) -> torch.Tensor:
    text = [vlm.processor.image_token]
    inputs = vlm.processor(text=text, images=[Image.fromarray(picture)], return_tensors="pt")
    with torch.no_grad():
        found = vlm.model.model.get_image_features(inputs["pixel_values"]).pooler_output
    return torch.cat(list(found)).flatten(0, -2)


def test_a_painted_box_changes_its_tokens_feature_most(vlm: Vlm) -> None:
    height, width = 2 * TILE, 3 * TILE
    found = token_boxes(vlm, height, width)
    for token in [*range(0, len(found), 5), *range(len(found) - SIDE**2, len(found))]:
        dark, bright = (features(vlm, picture) for picture in picture_pair(height, width, found[token]))
        view = same_view(token, len(found))
        assert (bright - dark).norm(dim=-1)[view].argmax() == token - view.start
