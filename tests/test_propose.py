import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from a3tune.errors import ConfigError
from a3tune.labels.propose import PROPOSERS
from a3tune.labels.propose.regions import Regions
from a3tune.labels.propose.superpixels import Superpixels
from a3tune.labels.propose.tree import grow
from a3tune.masks import bounding_box, decode_mask, encode_mask, mask_iou


def ellipse(side, cy, cx, ry, rx):
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1


def scan(seed: int, side: int = 120, noise: float = 5) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """A body with four textured organs, a lesion in the first, shading and noise."""
    rng = np.random.default_rng(seed)
    picture = np.where(ellipse(side, 0.5, 0.5, 0.42, 0.45), 90.0, 8.0)
    regions = {}
    for index, (cy, cx) in enumerate([(0.35, 0.3), (0.35, 0.7), (0.68, 0.35), (0.66, 0.66)]):
        mask = ellipse(side, cy + rng.uniform(-0.03, 0.03), cx, *rng.uniform(0.08, 0.14, 2))
        texture = 4 * ndimage.gaussian_filter(rng.normal(size=mask.shape), 1.5)
        picture[mask] = 90 + rng.choice([-1, 1]) * rng.uniform(25, 50) + texture[mask]
        regions[f"organ {index}"] = mask
    lesion = ellipse(side, 0.35, 0.3, 0.04, 0.045)
    picture[lesion] = 190
    regions["lesion"] = lesion
    picture = ndimage.gaussian_filter(picture, 0.6) * np.linspace(0.95, 1.05, side) + noise * rng.normal(
        size=picture.shape
    )
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).convert("RGB"), regions


def best_iou(image, regions, proposer):
    segments = [segment.mask for segment in proposer(image)]
    return mask_iou([encode_mask(mask) for mask in regions.values()], segments).max(1)


@pytest.mark.parametrize("noise", [0, 4, 12])
@pytest.mark.parametrize("proposer", [Superpixels(), Regions()])
def test_organs_and_lesions_are_among_the_segments(proposer, noise):
    found = np.concatenate([best_iou(*scan(seed, noise=noise), proposer) for seed in range(4)])
    assert (found >= 0.5).mean() >= 0.9
    assert found.mean() >= 0.75


@pytest.mark.parametrize("proposer", [Superpixels(), Regions()])
def test_segments_are_many_of_all_sizes_and_no_duplicates(proposer):
    image, _ = scan(0)
    segments = proposer(image)
    masks = [segment.mask for segment in segments]
    scores = [segment.score for segment in segments]
    areas = [decode_mask(mask).mean() for mask in masks]
    assert 30 <= len(segments) <= 80
    assert min(areas) < 0.005 < 0.03 < max(areas)
    assert (mask_iou(masks, masks) - np.eye(len(masks))).max() <= 0.8
    assert scores == sorted(scores, reverse=True)
    assert 0 <= min(scores) <= max(scores) <= 1


@pytest.mark.parametrize("size", [(120, 120), (90, 300), (37, 16)])
def test_what_is_read_off_the_tree_is_what_the_masks_say(size):
    """Filters and duplicates on masks in pixels, the slow way, with an enlargement that repeats nothing."""
    image = scan(4)[0].resize(size)
    proposer = Superpixels(working_side=300, max_overlap=0.6, min_side=0.05)
    everything = replace(proposer, max_overlap=1, max_segments=1000, max_frame=1, min_side=0)(image)
    masks = np.stack([decode_mask(segment.mask) for segment in everything])
    fits = np.flatnonzero(proposer.fit(masks))
    kept = fits[proposer.distinct(masks[fits], np.array([everything[index].score for index in fits]))]
    assert 3 < len(kept) < len(fits) < len(masks)
    assert proposer(image) == [everything[index] for index in kept]


@pytest.mark.parametrize("proposer", [Superpixels, Regions])
def test_the_same_image_gives_the_same_segments(proposer):
    assert proposer()(scan(3)[0]) == proposer()(scan(3)[0])


def film() -> tuple[Image.Image, np.ndarray]:
    """A chest with a lung that ribs cross, and the lung."""
    side = 240
    picture = np.where(ellipse(side, 0.5, 0.5, 0.48, 0.48), 170.0, 10.0)
    lung = ellipse(side, 0.5, 0.3, 0.33, 0.14)
    picture[lung] = 70
    ribs = ((np.arange(side) // 6) % 3 == 0)[:, None] & lung
    picture[ribs] += 100
    picture = ndimage.gaussian_filter(picture, 1) + 15 * np.random.default_rng(0).normal(size=picture.shape)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).convert("RGB"), lung


def test_the_second_tree_finds_a_lung_between_its_ribs():
    image, lung = film()
    fine, both = (best_iou(image, {"lung": lung}, Regions(large=large))[0] for large in (1.0, 0.06))
    assert both > 0.5 > fine


def test_perimeters_are_those_of_the_masks():
    image, _ = scan(5)
    tree = grow(image.resize((60, 45)), 128, 3.0)
    for node, perimeter in enumerate(tree.perimeter(np.arange(len(tree.size))).tolist()):
        padded = np.pad(tree.mask(node), 1)
        assert perimeter == sum(np.count_nonzero(np.diff(padded, axis=axis)) for axis in (0, 1))


def test_large_is_a_setting_with_a_range():
    assert Regions(large=0.2).settings() == {**Regions().settings(), "large": 0.2}
    with pytest.raises(ConfigError, match="regions: large: expected a number from 0 to 1"):
        Regions(large=2)


def test_filters_hold_at_any_image_size():
    proposer = Superpixels(min_side=0.1, min_area=0.01, max_area=0.3, max_frame=0, max_segments=10)
    image, _ = scan(1)
    for size in ((120, 120), (700, 500)):
        segments = proposer(image.resize(size))
        assert 1 <= len(segments) <= 10
        for segment in segments:
            mask = decode_mask(segment.mask)
            x0, y0, x1, y1 = bounding_box(segment.mask)
            assert mask.shape == (size[1], size[0])
            assert 0.009 <= mask.mean() <= 0.31
            assert min(x1 - x0, y1 - y0) / min(size) >= 0.09
            assert x0 > 0 and y0 > 0 and x1 < size[0] and y1 < size[1]


def test_large_images_get_masks_in_their_own_pixels():
    image, regions = scan(2)
    large = {name: np.kron(mask, np.ones((8, 8), bool)) for name, mask in regions.items()}
    assert best_iou(image.resize((960, 960)), large, Superpixels()).min() >= 0.5


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 255), st.booleans())
def test_odd_images_never_crash(width, height, value, noisy):
    pixels = np.full((height, width, 3), value, np.uint8)
    if noisy:
        pixels += np.random.default_rng(value).integers(0, 200, pixels.shape, dtype=np.uint8)
    for proposer in (Superpixels(), Regions()):
        for segment in proposer(Image.fromarray(pixels)):
            assert decode_mask(segment.mask).shape == (height, width)
            assert decode_mask(segment.mask).any()


def test_an_even_image_has_no_segments():
    for proposer in (Superpixels(), Regions()):
        assert proposer(Image.new("RGB", (120, 120), (50, 60, 70))) == []
        assert proposer(Image.new("RGB", (1, 1))) == []


def test_it_is_fast_enough_to_run_while_a_user_waits():
    image, _ = scan(0)
    proposer = Superpixels()
    proposer(image)
    start = time.process_time()
    proposer(image)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("setting", [{"max_area": 1.5}, {"working_side": 8}, {"max_segments": 0}, {"smoothing": 0}])
def test_settings_out_of_range_are_named(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name}: expected (a number|an integer) from"):
        Superpixels(**setting)


def test_settings_say_everything_the_segments_depend_on():
    assert PROPOSERS["superpixels"]().settings() == Superpixels().settings()
    assert Superpixels(max_overlap=0.5).settings() == {**Superpixels().settings(), "max_overlap": 0.5}
    assert Superpixels().settings()["name"] == "superpixels"
