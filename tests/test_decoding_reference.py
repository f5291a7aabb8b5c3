"""VCD and M3ID, in padded batches and with caches, against a decoder that reads everything again at each step."""

from dataclasses import replace
from math import exp, log

import pytest
import torch
from torch import Tensor

from a3tune.decoding import generate
from decoders import NEW, Models, batch, example, imageless, slow_greedy

MODELS = ("llava_clip_224", "llava_clip_224+adapter", "qwen2_5_vl", "qwen2_5_vl+adapter", "gemma3", "paligemma")
BORDERS = {"qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>"), "gemma3": ("<start_of_image>", "<end_of_image>")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("zoo"))


def cut(scores: Tensor, positive: Tensor) -> Tensor:
    out = scores.clone()
    for token in range(out.shape[1]):
        if positive[0, token] < positive[0].max() + log(0.1):
            out[0, token] = -torch.inf
    return out


def answers(vlm, method: str, settings: dict) -> list[list[int]]:
    found = generate(vlm, batch(vlm), method, strategy="greedy", max_new_tokens=NEW, settings=settings).tokens
    greedy = generate(vlm, batch(vlm), max_new_tokens=NEW).tokens
    assert any(not torch.equal(one, other) for one, other in zip(found, greedy, strict=True)), "the method does nothing"
    return [tokens.tolist() for tokens in found]


@pytest.mark.parametrize("name", MODELS)
def test_vcd(name: str, models: Models) -> None:
    vlm, kept = models(name), 1.0
    for step in range(501):
        kept *= 1 - (0.00001 + 0.00499 / (1 + exp(6 - 12 * step / 999)))
    for row, tokens in enumerate(answers(vlm, "vcd", {"alpha": 3.0})):
        clean = example(vlm, row)
        pixels = clean.images["pixel_values"]
        eps = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
        noisy = replace(clean, images=clean.images | {"pixel_values": kept**0.5 * pixels + (1 - kept) ** 0.5 * eps})
        assert tokens == slow_greedy(vlm, clean, noisy, lambda lc, ln, step: cut(4 * lc - 3 * ln, lc))


@pytest.mark.parametrize("name", MODELS)
def test_m3id(name: str, models: Models) -> None:
    vlm = models(name)

    def scores(positive: Tensor, negative: Tensor, step: int) -> Tensor:
        gamma = exp(-0.5 * step)
        lc, lu = positive.log_softmax(-1), negative.log_softmax(-1)
        return cut(lc + (1 - gamma) / gamma * (lc - lu), positive)

    # The published decay does little in so few tokens.
    for row, tokens in enumerate(answers(vlm, "m3id", {"decay": 0.5})):
        own = example(vlm, row)
        negative = imageless(vlm, own, *BORDERS.get(name.removesuffix("+adapter"), ()))
        assert tokens == slow_greedy(vlm, own, negative, scores)
