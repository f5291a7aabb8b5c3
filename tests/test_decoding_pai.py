"""PAI's boosted attention, in caches and batches, against eager attention over everything at each step."""

from collections.abc import Iterator
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from a3tune.attention.boost import Boost
from a3tune.attention.capture import ATTENTION, CaptureRequest, attention_forward
from a3tune.decoding import generate
from a3tune.decoding.branches import image_columns
from a3tune.decoding.loop import Branch
from decoders import NEW, Models, batch, example, imageless, logits, slow_greedy
from ports.boosted import PLACE

BORDERS = {
    "llava_clip_224": (),
    "qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>"),
    "gemma3": ("<start_of_image>", "<end_of_image>"),  # its first layer has a window shorter than the prompt
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    PLACE.clear()


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("name", BORDERS)
def test_pai_is_that_of_a_decoder_without_a_cache(name: str, variant: str, models: Models) -> None:
    vlm = models(name)
    settings = {"boost": 2.0, "gamma": 1.5, "start_layer": 0, "variant": variant}
    found = generate(vlm, batch(vlm), "pai", max_new_tokens=NEW, settings=settings).tokens
    vlm.model.set_attn_implementation({"text_config": "boosted_eager"})
    try:
        for row, tokens in enumerate(found):
            own = example(vlm, row)
            negative = imageless(vlm, own, *BORDERS[name])
            image = (own.input_ids == vlm.model.config.image_token_id).nonzero().flatten()
            boost = {
                "layers": range(32),
                "from": own.prompt_length - (variant == "paper"),
                "image": image,
                "strength": 2.0,
            }

            def scores(positive: Tensor, negative: Tensor, step: int) -> Tensor:
                lc, lu = positive.log_softmax(-1), negative.log_softmax(-1)
                return (1.5 * (lc - lu) + lu).masked_fill(lc < lc.max() + log(0.1), -torch.inf)

            def seen(example, boost: dict = boost) -> Tensor:
                PLACE.clear()
                if example.images:
                    PLACE.update(boost)
                return logits(vlm, example)

            assert tokens.tolist() == slow_greedy(vlm, own, negative, scores, seen)
    finally:
        vlm.model.set_attn_implementation({"text_config": ATTENTION})


def test_pai_without_boost_and_contrast_is_greedy_decoding(models: Models) -> None:
    vlm = models("llava_clip_224")
    nothing = {"boost": 0.0, "gamma": 1.0}
    found = generate(vlm, batch(vlm), "pai", max_new_tokens=NEW, settings=nothing).tokens
    vlm.model.set_attn_implementation({"text_config": "eager"})
    try:
        greedy = generate(vlm, batch(vlm), max_new_tokens=NEW).tokens
    finally:
        vlm.model.set_attn_implementation({"text_config": ATTENTION})
    assert all(torch.equal(one, other) for one, other in zip(found, greedy, strict=True))


def test_the_boost_brings_attention_to_the_image(models: Models) -> None:
    vlm = models("llava_clip_224")
    inputs = batch(vlm)

    def prefill(strength: float, layers: range = range(32)) -> Tensor:
        branch = Branch(vlm, inputs)
        boost = Boost(image_columns(vlm, inputs), strength, layers, branch.cache)
        return branch.prefill(boost=boost).logits

    plain = Branch(vlm, inputs).prefill().logits
    torch.testing.assert_close(prefill(0.0), plain)
    torch.testing.assert_close(prefill(1.0, range(2, 32)), plain, msg="the model has two layers")
    assert ((prefill(1.0) - plain).abs().amax((1, 2)) > 1e-3).all()


def test_only_the_last_row_changes_and_the_rest_stays_causal() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    module = nn.Module()
    module.layer_idx, module.num_key_value_groups, module.is_causal = 0, 2, True  # type: ignore[assignment]
    cache = DynamicCache()
    cache.update(key, value, 0)
    mask = torch.ones(5, 5).tril().bool().expand(2, 1, 5, 5).clone()
    mask[1, :, :, 0] = False
    mask[1, :, 0, 0] = True
    columns = torch.tensor([[1, 2], [0, -1]])

    def run(mask: Tensor | None, **options: Any) -> Tensor:
        return attention_forward(module, query, key, value, mask, scaling=0.5, **options)[0]

    boost = Boost(columns, 3.0, range(1), cache)
    for own in (mask, torch.where(mask, 0.0, torch.finfo(torch.float32).min)):
        plain, boosted = run(own), run(own, boost=boost)
        assert torch.equal(plain[:, :-1], boosted[:, :-1])
        assert not torch.allclose(plain[0, -1], boosted[0, -1])
        # The only image token of the second sample is masked, and what is masked is not brought back.
        torch.testing.assert_close(plain[1, -1], boosted[1, -1])
    assert not torch.allclose(run(None)[:, -1], run(None, boost=boost)[:, -1])
    first = Boost(columns, 3.0, range(1), cache, prompt=False)
    assert torch.equal(run(mask), run(mask, boost=first))


def test_capture_and_boost_go_together() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    module = nn.Module()
    module.layer_idx, module.num_key_value_groups, module.is_causal = 0, 1, True  # type: ignore[assignment]
    cache = DynamicCache()
    cache.update(key, value, 0)
    columns = torch.tensor([[0, 1]])
    request = CaptureRequest(torch.tensor([[0.0, 0.0, 1.0]]), columns, torch.tensor([[False, False, True]]))
    boost = Boost(columns, 1.0, range(1), cache)
    options: dict[str, Any] = {"scaling": 0.5, "capture": request}
    alone = attention_forward(module, query, key, value, None, **options)
    with_boost = attention_forward(module, query, key, value, None, boost=boost, **options)
    assert torch.equal(alone[1], with_boost[1])  # type: ignore[arg-type]
    assert not torch.allclose(alone[0], with_boost[0])
