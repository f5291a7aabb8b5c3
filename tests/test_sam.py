import copy
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Sam2Config, Sam2Model, SamConfig, SamHQConfig, SamHQModel, SamModel

from a3tune.errors import ConfigError, ModelError
from a3tune.labels.propose import HAVE_MODELS, PROPOSERS, make_proposer
from a3tune.labels.propose.canvas import Canvas
from a3tune.labels.propose.sam import Sam, SamNetwork, stability
from a3tune.masks import decode_mask, encode_mask, mask_iou

EVERYTHING = {"min_iou": 0.0, "min_stability": 0.0, "min_side": 0.0, "max_area": 1.0, "max_frame": 1.0}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "output_channels": 16,
    "global_attn_indexes": [1],
    "window_size": 4,
    "mlp_dim": 16,
    "num_pos_feats": 8,
}
PROMPT = {"hidden_size": 16, "image_size": 32, "patch_size": 4, "mask_input_channels": 4}
DECODER = {
    "hidden_size": 16,
    "mlp_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": 16,
}
HIERA = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 8,
    "num_attention_heads": 1,
    "image_size": [64, 64],
    "window_positional_embedding_background_size": [4, 4],
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [4, 2, 4, 2],
    "global_attention_blocks": [3],
}
VISION_2 = {
    "backbone_config": HIERA,
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "fpn_hidden_size": 16,
}


def random_sam(kind):
    parts = {"vision_config": VISION, "prompt_encoder_config": PROMPT, "mask_decoder_config": DECODER}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "sam":
            return SamModel(SamConfig(**parts))
        if kind == "sam_hq":
            return SamHQModel(SamHQConfig(**parts | {"mask_decoder_config": DECODER | {"vit_dim": 16}}))
        prompt = PROMPT | {"image_size": 64, "patch_size": 16}
        return Sam2Model(Sam2Config(**parts | {"vision_config": VISION_2, "prompt_encoder_config": prompt}))


@pytest.fixture(scope="session")
def sam_folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sams")
    for kind in ("sam", "sam_hq", "sam2"):
        random_sam(kind).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in ("sam", "sam_hq", "sam2")}


def noise(width=50, height=30):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["sam", "sam_hq", "sam2"])
def test_every_family_encodes_an_image_once_and_always_says_the_same(kind, sam_folders, monkeypatch):
    calls = []
    encode_image = SamNetwork.encode
    monkeypatch.setattr(SamNetwork, "encode", lambda self, pixels: calls.append(1) or encode_image(self, pixels))
    proposer = Sam(weights=sam_folders[kind], device="cpu", points_per_side=9, **EVERYTHING)
    segments = proposer(noise())
    assert calls == [1]
    assert 1 <= len(segments) <= 64
    assert all(decode_mask(segment.mask).shape == (30, 50) for segment in segments)
    scores = [segment.score for segment in segments]
    assert scores == sorted(scores, reverse=True) and 0 <= min(scores) <= max(scores) <= 1
    assert proposer(noise()) == segments == copy.copy(proposer)(noise())


@pytest.mark.parametrize("kind", ["sam", "sam_hq", "sam2"])
def test_all_three_masks_of_a_point_are_candidates(kind, sam_folders):
    network = SamNetwork(sam_folders[kind], "cpu")
    encoded = network.encode(torch.rand(1, 3, network.side, network.side))
    points = torch.tensor([[[[3.0, 4.0]], [[20.0, 9.0]]]])
    logits, scores = network.masks(encoded, several=True, input_points=points)
    assert logits.shape[:2] == scores.shape == (2, 3)
    single, score = network.masks(encoded, several=False, input_boxes=torch.tensor([[[2.0, 3.0, 20.0, 21.0]]]))
    assert single.shape[:2] == score.shape == (1, 1)


class Painter:
    """Stands in for a network: the mask of a point is what has the point's colour; the second and third are unsure."""

    side = 64

    def __init__(self, stretched, doubtful=False):
        self.stretched, self.doubtful, self.encoded = stretched, doubtful, 0

    def encode(self, pixels):
        self.encoded += 1
        return torch.bucketize(pixels[0].mean(0), torch.tensor([-1.2, 0.6]))

    def masks(self, encoded, *, several, input_points):
        x, y = input_points[0, :, 0].long().T
        same = encoded == encoded[y, x][:, None, None]
        logits = torch.where(same, 0.5 if self.doubtful else 5.0, -5.0)
        return torch.stack([logits] * 3, 1), torch.tensor([0.9, 0.3, 0.2]).expand(len(x), 3)


def tiles():
    """A grey image of 80 x 40 pixels with a light and a dark rectangle."""
    pixels = np.full((40, 80, 3), 100, np.uint8)
    pixels[8:24, 8:32] = 200
    pixels[20:36, 48:72] = 0
    return Image.fromarray(pixels), [encode_mask((pixels == value).all(-1)) for value in (200, 0)]


@pytest.mark.parametrize("stretched", [True, False])
def test_masks_lie_where_the_points_are(stretched, sam_folders):
    image, truth = tiles()
    proposer = Sam(weights=sam_folders["sam"], points_per_side=8)
    proposer.__dict__["_network"] = Painter(stretched)
    segments = proposer(image)
    assert len(segments) == 2
    assert [segment.score for segment in segments] == pytest.approx([0.9, 0.9])
    assert mask_iou(truth, [segment.mask for segment in segments]).max(1).min() > 0.85
    assert proposer._network.encoded == 1


def test_unlikely_and_unstable_masks_go(sam_folders):
    image, _ = tiles()

    def found(network, **settings):
        proposer = Sam(weights=sam_folders["sam"], points_per_side=8, **settings)
        proposer.__dict__["_network"] = network
        return len(proposer(image))

    assert found(Painter(False), min_iou=0.95) == 0
    assert found(Painter(False, doubtful=True)) == 0
    assert found(Painter(False, doubtful=True), min_stability=0.0) == 2
    assert found(Painter(False), max_frame=1.0, max_area=1.0) == 3


def test_an_even_image_has_no_segments(sam_folders):
    proposer = Sam(weights=sam_folders["sam"], points_per_side=8)
    proposer.__dict__["_network"] = Painter(False)
    assert proposer(Image.new("RGB", (60, 60), (9, 9, 9))) == []
    Sam(weights=sam_folders["sam"], device="cpu", points_per_side=2, **EVERYTHING)(Image.new("RGB", (1, 1)))


def test_stability_is_the_iou_of_two_thresholds():
    logits = torch.tensor([[[-2.0, -0.5], [0.5, 2.0]], [[2.0, 2.0], [2.0, 2.0]], [[-9.0, -9.0], [-9.0, -9.0]]])
    assert stability(logits).tolist() == pytest.approx([1 / 3, 1, 0])


def test_a_canvas_keeps_proportions_and_returns_masks_to_their_place():
    image = Image.new("RGB", (200, 100))
    canvas = Canvas.of(image, 64, stretched=False)
    assert canvas.used == (64, 32)
    assert canvas.coordinates(np.array([[200.0, 50.0]])).tolist() == [[64, 16]]
    pixels = canvas.pixels(image, -1.0, 2.0)
    assert pixels.shape == (1, 3, 64, 64)
    assert pixels[0, :, :32].eq(0.5).all() and pixels[0, :, 32:].eq(0).all()
    logits = torch.full((16, 16), -1.0)
    logits[:4, :8] = 1.0
    expected = np.zeros((100, 200), bool)
    expected[:50, :100] = True
    assert mask_iou([canvas.mask(logits)], [encode_mask(expected)])[0, 0] > 0.95


def test_settings_follow_numbers_and_weights(sam_folders):
    settings = [
        Sam(weights=sam_folders["sam"]).settings(),
        Sam(weights=sam_folders["sam"], points_per_side=16).settings(),
        Sam(weights=sam_folders["sam_hq"]).settings(),
    ]
    assert len({str(sorted(one.items())) for one in settings}) == 3
    assert Sam(weights=sam_folders["sam"], device="cpu").settings() == settings[0]
    published = {"min_iou": 0.5, "min_stability": 0.5, "max_overlap": 0.8, "points_per_side": 32}
    assert published.items() <= settings[0].items()


def test_folders_that_hold_no_segmenter(sam_folders, tmp_path, ranker_folder):
    with pytest.raises(ModelError, match=r"config\.json"):
        Sam(weights=tmp_path)
    with pytest.raises(ModelError, match=r"expected a segmenter of type sam, sam_hq, sam2.*'clip'"):
        Sam(weights=ranker_folder)
    with pytest.raises(ModelError, match="of type sam, got model_type 'sam2'"):
        make_proposer("medsam", sam_folders["sam2"])
    model = SamModel.from_pretrained(sam_folders["sam"])
    weights = {name: value for name, value in model.state_dict().items() if "iou_prediction_head" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelError, match=r"weights are missing: mask_decoder\.iou_prediction_head"):
        Sam(weights=tmp_path, device="cpu")(noise())


def test_proposers_by_name(sam_folders):
    proposer = make_proposer("sam", sam_folders["sam"], {"points_per_side": 4, "min_iou": 0}, "cpu")
    assert proposer == Sam(weights=sam_folders["sam"], points_per_side=4, min_iou=0, device="cpu")
    assert make_proposer("superpixels", settings={"max_segments": 9}).settings()["max_segments"] == 9
    for wrong, message in (
        (("sma",), "expected one of superpixels, regions, sam, medsam, litemedsam, got 'sma'"),
        (("sam",), "expected the folder of its model"),
        (("superpixels", sam_folders["sam"]), "needs no weights"),
        (("sam", sam_folders["sam"], {"points": 4, "device": "cpu"}), "no such setting: device, points; .*min_iou"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_proposer(*wrong)


def test_what_is_said_of_proposers_before_they_are_imported_is_true():
    for name, has_model in HAVE_MODELS.items():
        assert ("weights" in {field.name for field in fields(PROPOSERS[name])}) == has_model
