import copy
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy import ndimage
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from a3tune.errors import ConfigError, LabelError, ModelError
from a3tune.labels.rank import RANKERS, VISUAL_PROMPTS, format_query, make_ranker, show_each, top_k, visual
from a3tune.labels.rank.clip import ClipRanker
from a3tune.labels.rank.embed import square
from a3tune.types import Sample
from a3tune.vlm.tiny import train_tokenizer

similarities = arrays(float, st.integers(0, 12), elements=st.integers(-4, 4).map(lambda n: n / 4))


def equation_3(similarity, threshold):
    """S = {s in S* | Sim(E_s, E_P) >= tau_K}, one segment after the other."""
    chosen = set()
    for segment in range(len(similarity)):
        if similarity[segment] >= threshold:
            chosen.add(segment)
    return chosen


@settings(deadline=None)
@given(similarities, st.floats(-1.2, 1.2))
def test_a_threshold_is_equation_3(similarity, threshold):
    chosen = top_k(similarity, threshold=threshold)
    assert set(chosen.tolist()) == equation_3(similarity, threshold)
    assert len(chosen) == len(set(chosen.tolist()))


@settings(deadline=None)
@given(similarities, st.integers(1, 15))
def test_k_is_equation_3_with_the_threshold_that_k_segments_reach(similarity, k):
    chosen = top_k(similarity, k=k)
    assert len(chosen) == min(k, len(similarity))
    if len(chosen):
        reach = equation_3(similarity, min(similarity[chosen]))
        assert set(chosen.tolist()) <= reach
        if len(set(similarity.tolist())) == len(similarity):
            assert set(chosen.tolist()) == reach


@settings(deadline=None)
@given(similarities)
def test_order_is_best_first_and_ties_go_to_the_earlier_segment(similarity):
    assert top_k(similarity).tolist() == sorted(range(len(similarity)), key=lambda i: (-similarity[i], i))


def test_both_limits_hold_together():
    assert top_k(np.array([0.1, 0.9, 0.5, 0.7]), k=2, threshold=0.4).tolist() == [1, 3]
    assert top_k(np.array([0.1, 0.9, 0.5, 0.7]), k=4, threshold=0.6).tolist() == [1, 3]


def test_queries():
    sample = Sample("7", b"", "Is it {large}?", "yes", "closed", meta={"location": "liver"})
    assert format_query("{question}", sample) == "Is it {large}?"
    assert format_query("Medical image of {location}. {question}", sample) == "Medical image of liver. Is it {large}?"
    with pytest.raises(LabelError, match=r"sample 7: .*meta field 'plane', the sample has question, location"):
        format_query("{plane}: {question}", sample)
    for malformed in ("{question", "{}", "{question.x}"):
        with pytest.raises(ConfigError, match="query"):
            format_query(malformed, sample)


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(50, 200, (40, 60, 3), dtype=np.uint8)
    mask = np.zeros((40, 60), bool)
    mask[10:20, 30:50] = True
    mask[10, 30] = False
    return Image.fromarray(pixels), mask


def shown(name, picture):
    return np.asarray(VISUAL_PROMPTS[name](*picture)).astype(int)


def test_crop_is_the_box_and_black_outside_the_segment(picture):
    image, mask = np.asarray(picture[0]), picture[1]
    assert np.array_equal(shown("crop", picture), (image * mask[..., None])[10:20, 30:50])


def test_expand_adds_context_up_to_the_border(picture):
    assert np.array_equal(shown("expand", picture), np.asarray(picture[0])[5:25, 20:60])


def test_whole_image_prompts_leave_the_segment_as_it_is(picture):
    image, mask = np.asarray(picture[0]), picture[1]
    for name in ("blur", "dim"):
        assert np.array_equal(shown(name, picture)[mask], image[mask])
    assert np.abs(shown("dim", picture)[~mask] - 0.35 * image[~mask]).max() <= 0.5
    assert shown("blur", picture)[~mask].std() < 0.6 * image[~mask].std()


def test_box_draws_only_the_outline(picture):
    drawn = shown("box", picture)
    red = (drawn == (255, 0, 0)).all(-1)
    expected = np.zeros_like(red)
    expected[10:20, 30:50] = True
    expected[11:19, 31:49] = False
    assert np.array_equal(red, expected)
    assert np.array_equal(drawn[~red], np.asarray(picture[0])[~red])


@pytest.mark.parametrize("name", VISUAL_PROMPTS)
def test_prompts_do_not_change_the_image_and_work_at_any_size(name, picture):
    image, mask = picture
    before = np.asarray(image).copy()
    assert VISUAL_PROMPTS[name](image, mask).mode == "RGB"
    assert np.array_equal(np.asarray(image), before)
    assert VISUAL_PROMPTS[name](Image.new("RGB", (1, 1)), np.ones((1, 1), bool)).size == (1, 1)
    large = np.zeros((1200, 2000), bool)
    large[5:1100, 7] = True
    assert max(VISUAL_PROMPTS[name](Image.new("RGB", (2000, 1200)), large).size) <= 512


@pytest.mark.parametrize("colours", [True, False])
@pytest.mark.parametrize("name", VISUAL_PROMPTS)
def test_the_segments_of_an_image_are_shown_together_as_one_by_one(name, colours, monkeypatch):
    pixels = np.random.default_rng(0).integers(50, 200, (700, 600, 3 if colours else 1), dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(pixels, (700, 600, 3)).copy())
    masks = [np.zeros((700, 600), bool), np.zeros((600, 700), bool).T]
    masks[0][100:300, 20:400] = masks[1][7:9, 5:99] = masks[1][300:, 8] = True
    together = show_each(name, image, masks)
    for picture, mask in zip(together, masks, strict=True):
        alone = VISUAL_PROMPTS[name](image, mask)
        assert alone.mode == "RGB"
        assert alone.tobytes() == picture.convert("RGB").tobytes()
    monkeypatch.setattr(visual, "is_grey", lambda picture: False)
    assert [shown.tobytes() for shown in show_each(name, image, masks)] == [
        picture.convert("RGB").tobytes() for picture in together
    ]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = train_tokenizer(["where is the liver"] * 3, vocab=300)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 300, "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=small | ids, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_clip_embeds_to_unit_vectors_whatever_the_batch(clip_folder):
    rng = np.random.default_rng(0)
    sizes = ((20, 40), (64, 9), (1, 1))
    images = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    texts = ["where is the liver", "liver", "x " * 200]
    ranker = ClipRanker(clip_folder, device="cpu")
    one_by_one = ClipRanker(clip_folder, device="cpu", batch_size=1)
    for embed, single, items in (
        (ranker.embed_images, one_by_one.embed_images, images),
        (ranker.embed_texts, one_by_one.embed_texts, texts),
    ):
        vectors = embed(items)
        assert vectors.shape == (3, 8)
        assert vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert embed([]).shape == (0, 8)
        if items is images:
            assert np.allclose(vectors, single(items), atol=1e-5)
    assert not np.allclose(*ranker.embed_texts(texts[:2]), atol=1e-3)


def test_nothing_at_the_sides_of_an_image_is_cut_off(clip_folder):
    plain = np.full((30, 90, 3), 128, np.uint8)
    marked = plain.copy()
    marked[:, :10] = 255
    first, second = ClipRanker(clip_folder, device="cpu").embed_images(
        [Image.fromarray(plain), Image.fromarray(marked)]
    )
    assert np.abs(first - second).max() > 1e-3


def test_settings_follow_the_weights(clip_folder, tmp_path):
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = ClipRanker(clip_folder, device="cpu").settings()
    assert ClipRanker(tmp_path, device="cpu", batch_size=3).settings() == before
    model = CLIPModel.from_pretrained(tmp_path)
    model.logit_scale.data += 1
    model.save_pretrained(tmp_path)
    assert ClipRanker(tmp_path, device="cpu").settings() != before


def test_folders_that_hold_no_clip(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        ClipRanker(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="safetensors"):
        ClipRanker(tmp_path)


def test_grey_and_contour_show_the_segment_in_its_place(picture):
    image, mask = np.asarray(picture[0]).astype(int), picture[1]
    greyed = shown("grey", picture)
    assert np.array_equal(greyed[mask], image[mask])
    assert np.ptp(greyed[~mask], axis=1).max() == 0
    assert 0.4 < greyed[~mask].std() / np.asarray(picture[0].convert("L"))[~mask].std() < 0.6
    lined = shown("contour", picture)
    red = (lined == (255, 0, 0)).all(-1)
    assert np.array_equal(red, ndimage.binary_dilation(mask) & ~mask)
    assert np.array_equal(lined[~red], image[~red])


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    return save_siglip(tmp_path_factory.mktemp("siglip"), SiglipModel, SiglipConfig, SiglipImageProcessorPil, 32)


def save_siglip(folder, model, config, processor, size):
    tokenizer = train_tokenizer(["where is the liver"] * 3, vocab=300)
    tokenizer.padding_side = "right"
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": 300, "max_position_embeddings": 24, "projection_size": 16}
    vision = small | {"patch_size": 8} | ({"num_patches": 16} if model is Siglip2Model else {"image_size": size})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(config(text_config=text, vision_config=vision)).save_pretrained(folder)
    if model is Siglip2Model:
        processor(patch_size=8, max_num_patches=16).save_pretrained(folder)
    else:
        processor(size={"height": size, "width": size}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_siglip_reads_texts_padded_to_its_whole_context(siglip_folder):
    ranker = make_ranker(siglip_folder, "cpu")
    model, tokenizer = SiglipModel.from_pretrained(siglip_folder), train_tokenizer(["where is the liver"] * 3, 300)
    tokenizer.padding_side = "right"
    for text in ("liver", "where is the liver " * 1000):
        ids = tokenizer(text).input_ids[:24]
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (24 - len(ids))])
        with torch.inference_mode():
            expected = torch.nn.functional.normalize(model.get_text_features(ids).pooler_output, dim=-1)
        assert np.abs(ranker.embed_texts([text, "is"])[0] - expected[0].numpy()).max() < 1e-5


def test_pictures_are_resized_as_the_processor_does_and_may_have_one_channel(clip_folder, siglip_folder):
    rng = np.random.default_rng(0)
    grey = [Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)) for size in ((90, 140), (32, 32), (7, 7))]
    for folder in (clip_folder, siglip_folder):
        ranker = ClipRanker(folder, "cpu")
        vectors = ranker.embed_images([image.convert("RGB") for image in grey])
        assert np.array_equal(vectors, ranker.embed_images(grey))
        squares = [square(image.convert("RGB")) for image in grey]
        resized = [ranker._resized(image) for image in squares]
        assert {image.size for image in resized} == {(32, 32)}
        before, after = (ranker._images(images, return_tensors="np")["pixel_values"] for images in (squares, resized))
        assert np.array_equal(before, after)


def test_siglip_2_takes_images_of_any_size(tmp_path):
    ranker = make_ranker(save_siglip(tmp_path, Siglip2Model, Siglip2Config, Siglip2ImageProcessorPil, 32), "cpu")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((20, 40), (64, 9))]
    vectors = ranker.embed_images(images)
    assert vectors.shape == (2, 16) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.allclose(vectors[1], ranker.embed_images(images[1:])[0], atol=1e-5)
    assert not np.allclose(*vectors, atol=1e-3)
    assert ranker.embed_texts([]).shape == (0, 16)


def test_a_ranker_is_known_by_its_folder(clip_folder, siglip_folder, vlm_folder, tmp_path):
    for folder in (clip_folder, siglip_folder):
        ranker = make_ranker(folder, "cpu")
        assert isinstance(ranker, ClipRanker)
        twin = copy.copy(ranker)
        assert twin.settings() == ranker.settings()
        assert np.array_equal(twin.embed_texts(["liver"]), ranker.embed_texts(["liver"]))
    with pytest.raises(ModelError, match="ranker of type clip, siglip, siglip2, got model_type 'llava'"):
        make_ranker(vlm_folder)
    with pytest.raises(ModelError, match=r"open_clip_config\.json \(BiomedCLIP\) or config\.json .*clip, siglip"):
        make_ranker(tmp_path)


def test_a_ranker_of_ones_own_is_found_beside_a_config_json(vlm_folder, tmp_path, monkeypatch):
    shutil.copy(vlm_folder / "config.json", tmp_path)
    (tmp_path / "mine.json").write_text("{}")
    monkeypatch.setitem(RANKERS, "mine.json", lambda folder, device: ("mine", folder, device))
    assert make_ranker(tmp_path, "cpu") == ("mine", tmp_path, "cpu")


def test_a_ranker_without_some_of_its_weights_is_refused(clip_folder, tmp_path):
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = CLIPModel.from_pretrained(tmp_path)
    weights = {name: value for name, value in model.state_dict().items() if "text_projection" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelError, match=r"1 weights are missing: text_projection\.weight"):
        ClipRanker(tmp_path)
