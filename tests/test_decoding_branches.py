"""Negative branches: noise, images out of the prompt, image tokens out of the prompt or zero."""

from typing import Any

import pytest
import torch

from a3tune.decoding.branches import (
    encode_images,
    image_columns,
    image_mask,
    keep_features,
    noisy,
    without_images,
    zero_features,
)
from a3tune.decoding.loop import Branch
from a3tune.vlm.encode import TOKEN_MASKS, encode, prepare
from decoders import PROMPTS, Models, batch, image

FAMILIES = ("llava_clip_224", "llava_next", "qwen3_vl", "idefics3", "internvl", "gemma3", "paligemma")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize(("step", "kept", "added"), [(500, 0.863, 0.505), (999, 0.285, 0.959)])
def test_noise_is_that_of_the_published_schedule(step: int, kept: float, added: float) -> None:
    pixels = torch.full((1, 3, 64, 64), 10.0)
    mixed = noisy({"pixel_values": pixels}, step, seed=0)["pixel_values"]
    assert mixed.mean() == pytest.approx(10 * kept, abs=0.02)
    assert mixed.std() == pytest.approx(added, abs=0.02)
    assert torch.equal(mixed, noisy({"pixel_values": pixels}, step, seed=0)["pixel_values"])
    assert not torch.equal(mixed, noisy({"pixel_values": pixels}, step, seed=1)["pixel_values"])
    assert torch.equal(pixels, torch.full_like(pixels, 10.0))


@pytest.mark.parametrize("name", ["llava_clip_224", "qwen3_vl", "idefics3"])
def test_no_image_gets_other_noise_in_a_batch(name: str, models: Models) -> None:
    vlm = models(name)
    together = noisy(batch(vlm), 500, seed=0)["pixel_values"]
    alone = [noisy(batch(vlm, [row]), 500, seed=0)["pixel_values"] for row in range(len(PROMPTS))]
    if name == "idefics3":  # tiles that fill up the batch are zero, and stay so
        for row, own in enumerate(alone):
            assert torch.equal(together[row, : own.shape[1]], own[0])
            assert not together[row, own.shape[1] :].any()
    else:
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_without_images_is_the_templates_own(name: str, models: Models) -> None:
    vlm = models(name)
    encoded = batch(vlm)
    found = without_images(vlm, encoded)
    assert set(found) == {key for key, value in encoded.items() if value.shape == encoded["input_ids"].shape}
    tokens = found["input_ids"]
    assert not (tokens == vlm.model.config.image_token_id).any()
    assert found["attention_mask"].sum(1).max() == tokens.shape[1], "no wider than its longest prompt"
    for row, prompt in enumerate(PROMPTS):
        kept = found["attention_mask"][row].bool()
        assert kept.diff().sum() <= 1, "padding is on the left"
        assert kept[-1]
        text = vlm.tokenizer.decode(tokens[row][kept])
        if name == "paligemma":  # it has no form without an image
            assert text == f"<bos>{prompt}\n"
        else:
            own = vlm.tokenizer.decode(prepare(vlm, [], prompt).input_ids)
            assert "".join(text.split()) == "".join(own.split())
            if name in ("qwen3_vl", "idefics3"):  # the others write line ends around an image
                assert text == own.replace("User: ", "User:")  # Idefics3 writes the blank only before text


def test_several_images_leave_a_prompt_with_all_their_markup(models: Models) -> None:
    for name in ("idefics3", "qwen3_vl", "gemma3"):
        vlm = models(name)
        encoded: Any = dict(encode(vlm, [[image(0), image(1)]], ["<image> or <image> ?"], padding_side="left"))
        inputs = {key: value for key, value in encoded.items() if key not in TOKEN_MASKS}
        tokens = without_images(vlm, inputs)["input_ids"][0]
        own = prepare(vlm, [], "or ?").input_ids
        assert "".join(vlm.tokenizer.decode(tokens).split()) == "".join(vlm.tokenizer.decode(own).split())


@pytest.mark.parametrize("name", FAMILIES)
def test_columns_and_features_are_in_the_same_order(name: str, models: Models) -> None:
    """A feature that is made zero changes what the language model gets of its own token, and of no other."""
    vlm = models(name)
    encoded = encode_images(vlm, batch(vlm))
    columns = image_columns(vlm, encoded)
    mask = image_mask(vlm, encoded)
    assert torch.equal(torch.zeros_like(mask).scatter(1, columns.clamp_min(0), columns >= 0) | mask, mask)
    keep = torch.ones(int(mask.sum()), dtype=torch.bool)
    keep[[0, -1]] = False
    states = []

    def note(module: Any, args: tuple, kwargs: dict) -> None:
        states.append(kwargs["inputs_embeds"])

    hook = vlm.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        for inputs in (encoded, zero_features(encoded, keep)):
            Branch(vlm, inputs).prefill()
    finally:
        hook.remove()
    changed = (states[0] != states[1]).any(-1)
    places = mask.nonzero()[[0, -1]].tolist()
    assert changed.nonzero().tolist() == places


def test_later_layers_do_not_see_what_was_made_zero_either(models: Models) -> None:
    """Qwen3-VL adds features of the image to its first layers too."""
    vlm = models("qwen3_vl")
    encoded = encode_images(vlm, batch(vlm))
    keep = torch.zeros(int(image_mask(vlm, encoded).sum()), dtype=torch.bool)
    layers = zero_features(encoded, keep)["mm_encoder_outputs"]["image"].deepstack_features
    assert layers
    assert not any(part.any() for layer in layers for part in layer)
    assert any(part.any() for layer in encoded["mm_encoder_outputs"]["image"].deepstack_features for part in layer)


def test_kept_features_stand_in_their_new_order_and_the_others_leave_the_prompt(models: Models) -> None:
    vlm = models("llava_clip_224")
    encoded = encode_images(vlm, batch(vlm))
    chosen = torch.tensor([[5, 3], [44, 200], [89, 88]])
    found = keep_features(vlm, encoded, chosen)
    assert image_mask(vlm, found).sum(1).tolist() == [2, 2, 2]
    before, after = (
        [ids[kept.bool()].tolist() for ids, kept in zip(x["input_ids"], x["attention_mask"], strict=True)]
        for x in (encoded, found)
    )
    token = vlm.model.config.image_token_id
    assert [[i for i in ids if i != token] for ids in before] == [[i for i in ids if i != token] for ids in after]
    features = found["mm_encoder_outputs"]["image"].pooler_output
    for row in range(3):
        assert torch.equal(features[row], encoded["mm_encoder_outputs"]["image"].pooler_output[row][chosen[row]])
    assert len(encoded["mm_encoder_outputs"]["image"].pooler_output[0]) == 256, "the original is as it was"


@pytest.mark.parametrize("name", FAMILIES)
def test_features_in_the_place_of_pixels_give_the_same(name: str, models: Models) -> None:
    vlm = models(name)
    inputs = batch(vlm)
    torch.testing.assert_close(
        Branch(vlm, encode_images(vlm, inputs)).prefill().logits, Branch(vlm, inputs).prefill().logits
    )
