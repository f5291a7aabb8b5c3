"""ControlMLLM against its formula on the eager model, one sample at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from a3tune.attention.capture import use_capture
from a3tune.compat.generation import ENCODED
from a3tune.decoding import generate
from a3tune.decoding.base import Inputs
from a3tune.decoding.branches import encode_images, image_columns, image_mask
from a3tune.decoding.controlmllm import ControlMllm
from a3tune.errors import DataError, ModelError
from a3tune.vlm.load import Vlm
from decoders import NEW, Models, batch

MODELS = ("llava_clip_224", "qwen2_5_vl", "gemma3", "idefics3")
GENTLE = ControlMllm(learning_rate=0.1)
"""The zoo's image tokens are as small as everything in it."""
GENTLEST = ControlMllm(learning_rate=1e-4, steps=1)
"""With its random adapters gradients are in the thousands, and more steps would be chaos."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("zoo"))


def regions(vlm: Vlm, rows: Sequence[int] = (0, 1, 2)) -> Tensor:
    """The first tokens of each image, the last of them in part."""
    weights = torch.zeros(image_columns(vlm, batch(vlm, rows)).shape)
    weights[:, :5] = torch.tensor([1, 1, 1, 1, 0.5])
    return weights


def tuned(vlm: Vlm, method: ControlMllm, rows: Sequence[int], weights: Tensor | None = None) -> list[Tensor]:
    """Features per image."""
    with torch.no_grad():
        inputs = method.control(vlm, batch(vlm, rows), regions(vlm, rows) if weights is None else weights)
    return list(inputs[ENCODED]["image"].pooler_output)


@contextmanager
def eager(vlm: Vlm) -> Iterator[None]:
    vlm.model.set_attn_implementation({"text_config": "eager"})
    try:
        yield
    finally:
        use_capture(vlm.model)


def slow(vlm: Vlm, method: ControlMllm, row: int) -> Tensor:
    """The tuned features of one image, by the published recipe on the whole attention of the eager model."""
    inputs, region = encode_images(vlm, batch(vlm, [row])), regions(vlm, [row])[0]
    image = image_mask(vlm, inputs)[0]
    encoded = inputs[ENCODED]["image"]
    kind, base = type(encoded.pooler_output), encoded.pooler_output[0].detach()
    prompt = torch.zeros_like(base, requires_grad=True)
    history = prompt
    for _ in range(method.steps):
        current = method.beta * prompt + (1 - method.beta) * history
        base_now = base + current
        encoded.pooler_output = base_now[None] if kind is Tensor else [base_now]
        looks = attention_on_image(vlm, inputs, image)
        loss = 400 * (1 - (looks * region).sum() / looks.sum()) ** 2
        (gradient,) = torch.autograd.grad(loss, [prompt])
        history = current.detach()
        base = base_now.detach() if method.accumulate else base
        prompt = (prompt - method.learning_rate * gradient).detach().requires_grad_()
    return (base + method.beta * prompt + (1 - method.beta) * history).detach()


def attention_on_image(vlm: Vlm, inputs: Inputs, image: Tensor) -> Tensor:
    """Of the text after the image, `[N]`: mean of all layers, heads and rows of the eager model."""
    after = torch.arange(len(image)) > image.nonzero().max()
    with eager(vlm):
        attention = vlm.model(**inputs, output_attentions=True, use_cache=False).attentions
    looks = [layer[0, head][after].mean(0)[image] for layer in attention for head in range(layer.shape[1])]
    return torch.stack(looks).mean(0)


def inside(vlm: Vlm, method: ControlMllm, row: int) -> float:
    """Share of a sample's attention on the image that falls into the region once it was tuned."""
    inputs, region = batch(vlm, [row]), regions(vlm, [row])
    with torch.no_grad():
        looks = attention_on_image(vlm, method.control(vlm, inputs, region), image_mask(vlm, inputs)[0])
    return float((looks * region[0]).sum() / looks.sum())


@pytest.mark.parametrize("name", MODELS)
def test_the_image_tokens_are_tuned_by_the_published_recipe(name: str, models: Models) -> None:
    vlm = models(name)
    plain = encode_images(vlm, batch(vlm))[ENCODED]["image"].pooler_output
    for row, features in enumerate(tuned(vlm, GENTLE, (0, 1, 2))):
        expected = slow(vlm, GENTLE, row)
        torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-3)
        assert (expected - plain[row]).abs().max() > 1e-2


def test_the_published_accumulation_can_be_had(models: Models) -> None:
    vlm, method = models("qwen2_5_vl"), ControlMllm(learning_rate=0.01, steps=3, accumulate=True)
    (features,) = tuned(vlm, method, [1])
    torch.testing.assert_close(features, slow(vlm, method, 1), atol=1e-4, rtol=1e-3)
    (other,) = tuned(vlm, ControlMllm(learning_rate=0.01, steps=3), [1])
    assert (features - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_more_attention_falls_into_the_region(name: str, models: Models) -> None:
    vlm = models(f"{name}+adapter")
    for row in range(3):
        before, after = (inside(vlm, ControlMllm(learning_rate=1e-5, steps=steps), row) for steps in (0, 5))
        assert after > before


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llava_clip_224+adapter", GENTLEST),
        ("qwen2_5_vl+adapter", GENTLEST),
        ("idefics3+adapter", GENTLEST),
        ("gemma3", GENTLE),
        ("llava_clip_224", GENTLE),
    ],
)
def test_a_padded_batch_gives_what_its_samples_give_alone(name: str, method: ControlMllm, models: Models) -> None:
    vlm = models(name)
    plain = encode_images(vlm, batch(vlm))[ENCODED]["image"].pooler_output
    features = tuned(vlm, method, (0, 1, 2))
    together = generate(vlm, batch(vlm), method, regions_BN=regions(vlm), max_new_tokens=NEW).tokens
    for row, tokens in enumerate(together):
        own = regions(vlm, [row])
        alone = generate(vlm, batch(vlm, [row]), method, regions_BN=own, max_new_tokens=NEW).tokens[0]
        assert torch.equal(tokens, alone)
        torch.testing.assert_close(features[row], tuned(vlm, method, [row])[0], atol=1e-5, rtol=1e-4)
        assert (features[row] - plain[row]).abs().max() > 1e-3


def test_without_steps_or_regions_it_answers_plainly(models: Models) -> None:
    vlm = models("qwen2_5_vl")
    inputs, weights = batch(vlm), regions(vlm)
    for strategy in ("greedy", "beam"):
        plain = generate(vlm, inputs, strategy, max_new_tokens=NEW).tokens
        for method, given in ((ControlMllm(steps=0), weights), (GENTLE, torch.zeros_like(weights))):
            found = generate(vlm, inputs, method, strategy=strategy, regions_BN=given, max_new_tokens=NEW).tokens
            assert [tokens.tolist() for tokens in found] == [tokens.tolist() for tokens in plain]
    changed = generate(vlm, inputs, GENTLE, regions_BN=weights, max_new_tokens=NEW).tokens
    plain = generate(vlm, inputs, "greedy", max_new_tokens=NEW).tokens
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(changed, plain, strict=True))


def test_a_sample_without_a_region_is_left_as_it_is(models: Models) -> None:
    vlm = models("qwen2_5_vl")
    weights = regions(vlm)
    weights[1] = 0
    plain = encode_images(vlm, batch(vlm))[ENCODED]["image"].pooler_output
    changes = [
        (ours - own).abs().max() for ours, own in zip(tuned(vlm, GENTLE, (0, 1, 2), weights), plain, strict=True)
    ]
    assert changes[1] == 0
    assert changes[0] > 1e-2 < changes[2]


def test_the_model_is_frozen(models: Models) -> None:
    vlm = models("qwen2_5_vl+adapter")
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    learning = [name for name, value in vlm.model.named_parameters() if value.requires_grad]
    generate(vlm, batch(vlm), GENTLE, regions_BN=regions(vlm), max_new_tokens=1)
    assert all(torch.equal(value, before[name]) for name, value in vlm.model.state_dict().items())
    assert all(value.grad is None for value in vlm.model.parameters())
    assert learning == [name for name, value in vlm.model.named_parameters() if value.requires_grad]


def test_what_it_needs_it_says(models: Models) -> None:
    vlm = models("llava_clip_224")
    inputs: dict[str, Any] = batch(vlm)
    with pytest.raises(DataError, match=r"true regions.*got none"):
        generate(vlm, inputs, "controlmllm")
    with pytest.raises(DataError, match=r"\[3, 256\], got \[3, 4\]"):
        generate(vlm, inputs, "controlmllm", regions_BN=torch.ones(3, 4))
    vlm.model.set_attn_implementation({"text_config": "sdpa"})
    with pytest.raises(ModelError, match="attention=True"):
        generate(vlm, inputs, "controlmllm", regions_BN=regions(vlm))
    use_capture(vlm.model)
