"""Contrastive methods on tiny models: batches against their samples alone, branches that differ and keep apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from a3tune.decoding import DECODERS, generate, make_decoder
from a3tune.decoding.avisc import Avisc
from a3tune.decoding.branches import encode_images, image_columns, image_mask
from a3tune.decoding.damro import Damro, class_attention
from a3tune.decoding.loop import Branch
from a3tune.decoding.strategy import Strategy
from a3tune.errors import ModelError
from a3tune.vlm.load import load_vlm
from decoders import NEW, Models, batch

METHODS = ("vcd", "avisc", "m3id", "damro", "pai")
MODELS = ("llava_clip_224", "qwen2_5_vl", "gemma3")
SETTINGS = {"pai": {"boost": 2.0, "start_layer": 0}}
"""The tiny models have two layers; PAI starts at the third."""
COMBINATIONS = [(name, method) for name in MODELS for method in METHODS if method != "damro" or "llava" in name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(num_beams=3)], ids=["greedy", "beam"])
@pytest.mark.parametrize(("name", "method"), COMBINATIONS)
def test_a_padded_batch_gives_what_its_samples_give_alone(
    name: str, method: str, strategy: Strategy, models: Models
) -> None:
    vlm = models(f"{name}+adapter")
    options: Any = {"strategy": strategy, "max_new_tokens": NEW, "settings": SETTINGS.get(method)}
    together = generate(vlm, batch(vlm), method, **options).tokens
    for row, tokens in enumerate(together):
        assert torch.equal(tokens, generate(vlm, batch(vlm, [row]), method, **options).tokens[0])


@pytest.mark.parametrize(("name", "method"), COMBINATIONS)
def test_the_negative_branch_says_something_else(
    name: str, method: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, seen = models(name), []
    combine: Any = DECODERS[method].combine  # type: ignore[attr-defined]

    def spy(self, positive: Tensor, negative: Tensor, step: int) -> Tensor:
        seen.append((positive - negative).std(-1))
        return combine(self, positive, negative, step)

    monkeypatch.setattr(DECODERS[method], "combine", spy)
    generate(vlm, batch(vlm), method, max_new_tokens=3)
    assert len(seen) == 3
    assert torch.stack(seen).min() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_each_branch_keeps_the_gates_of_its_own_prompt(name: str, models: Models) -> None:
    """The adapter's alpha stays with the cache: read in turn, each branch goes on as if it were alone."""
    vlm, token = models(f"{name}+adapter"), torch.tensor([5])
    prompts = [batch(vlm, [0]), batch(vlm, [2])]
    alone = []
    for inputs in prompts:
        branch = Branch(vlm, inputs)
        branch.prefill()
        alone.append(branch.step(token).logits)
    branches = [Branch(vlm, inputs) for inputs in prompts]
    for branch in branches:
        branch.prefill()
    in_turn = [branch.step(token).logits for branch in branches]
    gates = [branch.cache.gates for branch in branches]
    assert gates[0]
    assert all(not torch.equal(gates[0][key], gates[1][key]) for key in gates[0])
    for one, other in zip(alone, in_turn, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_without_an_image_gets_an_answer(method: str, models: Models) -> None:
    """Both branches are then the same, and so is the answer: contrast and boost have nothing to take hold of."""
    vlm = models("llava_clip_224")
    inputs = {"input_ids": torch.randint(100, 300, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    inputs["attention_mask"][0, :2] = 0
    found = generate(vlm, inputs, method, strategy="greedy", max_new_tokens=NEW).tokens
    greedy = generate(vlm, inputs, max_new_tokens=NEW).tokens
    assert all(torch.equal(one, other) for one, other in zip(found, greedy, strict=True))


def test_avisc_keeps_the_tokens_that_the_layers_look_at_most() -> None:
    map_BLN = torch.tensor([[[0.4, 0.0, 0.1, 0.1], [0.0, 0.25, 0.05, 0.1], [0.0, 0.0, 0.05, 0.05]]])
    real_BN = torch.ones(1, 4, dtype=torch.bool)
    # Shares .54, .36, .09: the first layer alone passes one half, the first two pass .8.
    assert Avisc(tokens=1).blind(map_BLN, real_BN).tolist() == [[True, False, False, False]]
    assert Avisc(tokens=2, layer_share=0.8).blind(map_BLN, real_BN).tolist() == [[True, True, False, False]]
    assert Avisc(selector="std").blind(map_BLN, real_BN).tolist() == [[True, False, False, False]]
    even = torch.full_like(map_BLN, 0.1)
    assert not Avisc(selector="std").blind(even, real_BN).any()
    real_BN[0, 0] = False
    assert Avisc(tokens=9).blind(map_BLN, real_BN).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("selector", ["topk", "std"])
def test_avisc_zeroes_all_but_the_blind(selector: str, models: Models) -> None:
    vlm = models("qwen2_5_vl")
    encoded = encode_images(vlm, batch(vlm))
    features = torch.cat(list(encoded["mm_encoder_outputs"]["image"].pooler_output))
    negative = make_decoder("avisc", {"selector": selector, "tokens": 3}).negative(vlm, encoded)  # type: ignore[attr-defined]
    left = torch.cat(list(negative["mm_encoder_outputs"]["image"].pooler_output))
    kept = left.ne(0).any(-1)
    assert torch.equal(left[kept], features[kept])
    assert 0 < kept.sum() < len(kept)
    if selector == "topk":
        tokens = (image_columns(vlm, encoded) >= 0).sum(1).tolist()
        assert [int(part.sum()) for part in kept.split(tokens)] == [3, 3, 3]


@pytest.mark.parametrize("variant", ["official", "medheval"])
def test_damro_keeps_what_the_class_token_attends_to(variant: str, models: Models) -> None:
    vlm = models("llava_clip_224")
    inputs = batch(vlm)
    method = Damro(variant=variant, tokens=10)  # type: ignore[arg-type]
    encoded, negative = method.branches(vlm, inputs)
    features = list(encoded["mm_encoder_outputs"]["image"].pooler_output)
    left = list(negative["mm_encoder_outputs"]["image"].pooler_output)
    tower: Any = vlm.model.get_encoder(modality="image")
    layer = -2 if variant == "official" else -1
    states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    attention = tower.encoder.layers[layer].self_attn
    # What goes into a layer is what comes out of the one before.
    entered = tower.encoder.layers[layer].layer_norm1(states[layer - 1])
    query, key = attention.q_proj(entered), attention.k_proj(entered)
    for row in range(len(features)):
        if variant == "official":
            scores = (query[row, 0] @ key[row].T / query.shape[-1] ** 0.5).softmax(-1)
        else:
            heads = [
                (query[row, 0, part] @ key[row][:, part].T / attention.head_dim**0.5).softmax(-1)
                for part in torch.arange(query.shape[-1]).split(attention.head_dim)
            ]
            scores = torch.stack(heads).mean(0)
        best = scores[1:].topk(10).indices
        if variant == "official":
            assert torch.equal(left[row], features[row][best])
            assert int(image_mask(vlm, negative)[row].sum()) == 10
        else:
            assert torch.equal(left[row].ne(0).any(-1).nonzero().flatten(), best.sort().values)
            assert torch.equal(left[row][best], features[row][best])


def test_the_attention_of_a_class_token_leaves_itself_out() -> None:
    query, key = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    assert class_attention(query, key, heads=2).tolist() == [[pytest.approx(1 / 3)] * 2]


def test_methods_say_what_a_model_lacks(models: Models, vlm_folder: Path) -> None:
    vlm = models("qwen2_5_vl")
    with pytest.raises(ModelError, match=r"damro: needs the attention of a CLIP tower's class token.*qwen2_5_vl"):
        generate(vlm, batch(vlm), "damro")
    plain = load_vlm(vlm_folder, device="cpu", attention=False)
    for method in ("avisc", "pai"):
        with pytest.raises(ModelError, match=rf"{method}.*attention=True"):
            make_decoder(method).check(plain)
