"""A3MoE inside a VLM through PEFT: routing, padding, caches, generation, checkpointing, files, refusals."""

import copy
import itertools
import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, LlavaForConditionalGeneration, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from a3tune.adapters import A3MoEConfig, KeyExperts, Routing, add_adapter, balance_loss, gate_loads, load_adapter
from a3tune.adapters.layer import RoutedKey, RoutedLinear, RoutedQuery
from a3tune.compat.generation import CACHE
from a3tune.config import AdapterConfig
from a3tune.errors import AdapterError, ConfigError
from a3tune.vlm.tiny import random_vlm

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHAPE = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 96, "image_size": 36}
SMALL = {"rank": 4, "expert_rank": 3, "query_experts": 3, "key_experts": 4, "router_hidden": 8}
PAD, BOS, IMAGE = 0, 1, 2
IMAGE_TOKENS = 9
PROMPTS = [([20, 21, 22], 1), ([30, 31, 32, 33, 34], 0), ([40, 41, 42, 43], 2), ([50], 1)]


def base(**shape: int) -> LlavaForConditionalGeneration:
    model = random_vlm(**{**SHAPE, **shape})
    model.generation_config.eos_token_id = None
    return model


def shake(model: nn.Module, std: float = 0.4, seed: int = 3) -> None:
    """Weights that make every expert and gate matter."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=std)


def adapted(kind="a3moe", shape: dict | None = None, **options) -> PeftModel:
    beside = {name: options.pop(name) for name in ("balance", "key_text_tokens", "control_ids") if name in options}
    settings = AdapterConfig(kind, **{**SMALL, **options})
    model = add_adapter(base(**(shape or {})), settings, **beside).eval()
    shake(model)
    return model


def batch(prompts=PROMPTS, side: str = "left", answer: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Images before the text, except that a second image stands in the middle of it."""
    rows = []
    for text, images in prompts:
        image = [IMAGE] * IMAGE_TOKENS
        rows.append([BOS, *(image * min(images, 1)), *text[:1], *(image * max(images - 1, 0)), *text[1:], *answer])
    longest = max(map(len, rows))
    fill = [[PAD] * (longest - len(row)) for row in rows]
    padded = [f + r if side == "left" else r + f for f, r in zip(fill, rows, strict=True)]
    ones = [
        [0] * len(f) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(f)
        for f, r in zip(fill, rows, strict=True)
    ]
    inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(ones)}
    torch.manual_seed(11)
    pixels = [torch.randn(images, 3, 36, 36) for _, images in PROMPTS]
    chosen = [pixels[PROMPTS.index(prompt)] for prompt in prompts]
    if sum(images for _, images in prompts):
        inputs["pixel_values"] = torch.cat(chosen)
    return inputs


def routing_of(inputs: dict[str, Tensor], prompt_length: int | None = None) -> Routing:
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    prompt = real & (ids != IMAGE)
    if prompt_length is not None:
        prompt &= torch.arange(ids.shape[1]) < prompt_length
    return Routing(prompt, ids == IMAGE)


def layers_of(model: nn.Module, cls: type[RoutedLinear]) -> list[RoutedLinear]:
    return [module for module in model.modules() if isinstance(module, cls)]


def test_all_linears_of_the_language_model_and_nothing_else():
    model = adapted()
    linears = {name for name, module in base().named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linears if name.startswith("model.language_model.")}
    found = {
        name.removesuffix(".base_layer").removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if name.endswith(".base_layer")
    }
    assert found == expected and len(expected) == 7 * 2 and linears - expected
    assert len(layers_of(model, RoutedQuery)) == len(layers_of(model, RoutedKey)) == 2
    assert all((".lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())


def test_defaults_are_those_of_appendix_c1():
    config = add_adapter(base()).peft_config["default"]
    assert (config.r, config.lora_alpha, config.expert_rank, config.expert_alpha) == (64, 16, 16, 8)
    assert (config.query_experts, config.key_experts, config.top_experts) == (4, 8, 2)


@pytest.mark.parametrize("kind", ["a3moe", "lora"])
def test_a_fresh_adapter_changes_nothing(kind: str):
    inputs = batch()
    assert torch.equal(add_adapter(base(), AdapterConfig(kind))(**inputs).logits, base()(**inputs).logits)


def copy_lora(lora: PeftModel, model: PeftModel) -> None:
    """The weights of plain LoRA into layers of one expert each, and elsewhere as they are."""
    target = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if ".lora_" not in name:
                continue
            for here in (name, *(name.replace(f"lora_{x}.default", f"lora_experts.default.{x}") for x in "AB")):
                if here in target:
                    target[here].copy_(parameter)


@pytest.mark.parametrize(
    "options",
    [
        {
            "query_experts": 1,
            "key_experts": 1,
            "top_experts": 1,
            "expert_rank": 4,
            "expert_alpha": 16,
            "key_text_tokens": True,
        },
        {"query_experts": 0, "key_experts": 0},
        {"query_experts": 1, "key_experts": 0, "expert_rank": 4, "expert_alpha": 16},
    ],
)
def test_one_expert_with_a_constant_gate_or_none_is_plain_lora_exactly(options: dict):
    lora, model = adapted("lora"), adapted(**options)
    copy_lora(lora, model)
    inputs = batch()
    assert torch.equal(model(**inputs).logits, lora(**inputs).logits)
    assert not torch.equal(model(**inputs).logits, base()(**inputs).logits)


def test_an_adapter_without_experts_merges_and_a_routed_one_does_not():
    inputs = batch()
    plain = adapted(query_experts=0, key_experts=0)
    before = plain(**inputs).logits
    torch.testing.assert_close(plain.merge_and_unload()(**inputs).logits, before, rtol=0, atol=1e-4)
    for options in ({}, {"query_experts": 0}, {"key_experts": 0}):
        routed = adapted(**options)
        before = routed(**inputs).logits
        with pytest.raises(AdapterError, match="depends on the prompt"):
            routed.merge_and_unload()
        with pytest.raises(AdapterError, match="cannot be merged"):
            routed.merge_adapter()
        assert torch.equal(routed(**inputs).logits, before)


def test_query_and_key_projections_are_base_plus_experts():
    model = adapted()
    inputs, seen = batch(), {}
    routing = routing_of(inputs)
    for layer in layers_of(model, RoutedLinear):
        layer.register_forward_hook(lambda module, args, out: seen.update({module: (args[0], out)}))
    model(**inputs, routing=routing)
    assert len(seen) == 4
    for layer, (x, out) in seen.items():
        experts = layer.lora_experts["default"]
        mask = routing.image_mask
        delta = (
            experts(x, mask) if isinstance(experts, KeyExperts) else experts(x, experts.gate(x, routing.prompt_mask))
        )
        torch.testing.assert_close(out, layer.base_layer(x) + delta, rtol=0, atol=1e-6)
        assert delta.abs().max() > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
def test_derived_routing_is_that_of_the_masks(side: str):
    model, inputs = adapted(), batch(side=side)
    assert torch.equal(model(**inputs).logits, model(**inputs, routing=routing_of(inputs)).logits)
    other = Routing(routing_of(inputs).image_mask, routing_of(inputs).prompt_mask)
    assert not torch.allclose(model(**inputs).logits, model(**inputs, routing=other).logits, atol=1e-3)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_does_not_see_its_batch(side: str, kv_heads: int):
    model, inputs = adapted(shape={"kv_heads": kv_heads}), batch(side=side)
    together = model(**inputs).logits
    for row, prompt in enumerate(PROMPTS):
        alone = model(**batch([prompt])).logits[0]
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][real], alone, rtol=0, atol=2e-5)


def test_answer_tokens_do_not_route_the_prompt():
    model = adapted()
    one, two = batch(PROMPTS[:1], answer=(60, 61)), batch(PROMPTS[:1], answer=(70, 71))
    length = one["input_ids"].shape[1] - 2
    first, second = (model(**x, routing=routing_of(x, length)).logits[:, :length] for x in (one, two))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    derived = model(**one).logits[:, :length]
    assert not torch.allclose(first, derived, atol=1e-3)


def test_routing_of_the_wrong_shape_or_missing_is_refused():
    model, inputs = adapted(), batch()
    mask = torch.ones(4, 3, dtype=torch.bool)
    with pytest.raises(AdapterError, match=r"shape of input_ids.*\(4, 3\)"):
        model(**inputs, routing=Routing(mask, mask))
    embeds = model.get_input_embeddings()(torch.tensor([[BOS, 20]]))
    with pytest.raises(AdapterError, match="inputs_embeds alone takes routing="):
        model(inputs_embeds=embeds)
    with pytest.raises(AdapterError, match="within a batch"):
        model(**inputs, adapter_names=["default"] * 4)


class FixedPrompt:
    """Reference for generation without a cache: the prompt ends where it ended, whatever was generated since."""

    def __init__(self, model: PeftModel, length: int) -> None:
        inner = model.get_base_model().model
        self.handle = inner.register_forward_pre_hook(self, with_kwargs=True, prepend=True)
        self.length = length

    def __call__(self, module, args, kwargs):
        return args, {**kwargs, "routing": routing_of(kwargs, self.length)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("options", [{}, {"key_text_tokens": True}])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}])
def test_generation_with_cache_equals_recomputing_everything(how: dict, options: dict, kv_heads: int):
    model, inputs = adapted(shape={"kv_heads": kv_heads}, **options), batch()
    length = inputs["input_ids"].shape[1]
    # An image's token, which random weights may draw, has no features.
    how = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": [model.config.image_token_id], **how}
    torch.manual_seed(0)
    fast = model.generate(**inputs, **how)
    torch.manual_seed(0)
    with FixedPrompt(model, length):
        slow = model.generate(**inputs, **how, use_cache=False)
    assert fast.shape[1] == length + 6 and torch.equal(fast, slow)
    assert len({tuple(row.tolist()) for row in fast[:, length:]}) > 1


def test_static_cache_generates_the_same_and_forgets_the_last_prompt():
    model = adapted()
    for prompts in (PROMPTS[:2], PROMPTS[2:]):
        inputs = batch(prompts)
        how = {"do_sample": False, "max_new_tokens": 5}
        static = model.generate(**inputs, **how, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, model.generate(**inputs, **how))


def step(model: PeftModel, cache: DynamicCache, mask: Tensor, *tokens: int, **more: Any) -> Tensor:
    ids = torch.tensor([tokens] * len(mask))
    mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return model(input_ids=ids, attention_mask=mask, **{CACHE: cache}, **more).logits


def prefill(model: PeftModel, prompts=PROMPTS) -> tuple[DynamicCache, Tensor]:
    cache, inputs = DynamicCache(), batch(prompts)
    model(**inputs, **{CACHE: cache})
    return cache, inputs["attention_mask"]


@torch.no_grad()
def test_two_branches_with_their_own_caches_never_mix():
    model = adapted()
    expected = [step(model, *prefill(model, PROMPTS[i : i + 1]), 70) for i in (0, 2)]
    first, second = prefill(model, PROMPTS[:1]), prefill(model, PROMPTS[2:3])
    copied = copy.deepcopy(first[0]), first[1]
    assert torch.equal(step(model, *first, 70), expected[0])
    assert torch.equal(step(model, *second, 70), expected[1])
    assert torch.equal(step(model, *copied, 70), expected[0])


@torch.no_grad()
def test_alpha_follows_the_batch_of_its_cache():
    model = adapted()
    order = torch.tensor([2, 0, 3, 1])
    expected = step(model, *prefill(model), 70)
    cache, mask = prefill(model)
    cache.reorder_cache(order)
    torch.testing.assert_close(step(model, cache, mask[order], 70), expected[order], rtol=0, atol=1e-5)
    cache, mask = prefill(model)
    cache.batch_repeat_interleave(2)
    again = mask.repeat_interleave(2, dim=0)
    torch.testing.assert_close(step(model, cache, again, 70), expected.repeat_interleave(2, dim=0), rtol=0, atol=1e-5)
    cache.batch_select_indices(torch.tensor([6, 1]))
    cache.crop(-1)
    torch.testing.assert_close(step(model, cache, mask[[3, 0]], 70), expected[[3, 0]], rtol=0, atol=1e-5)
    for layer in cache.layers:
        layer.batch_select_indices(torch.tensor([0]))
    with pytest.raises(AdapterError, match="gates for 2 samples, the input has 1"):
        step(model, cache, torch.cat([mask[[3]], torch.ones(1, 1, dtype=mask.dtype)], dim=1), 70)


@torch.no_grad()
def test_a_continued_prefill_keeps_the_alpha_of_the_prompt():
    model = adapted()
    cache, mask = prefill(model, PROMPTS[:1])
    with pytest.raises(AdapterError, match="would read a prompt in parts"):
        step(model, cache, mask, 60, 61, 62)
    cache, mask = prefill(model, PROMPTS[:1])
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    continued = step(model, cache, mask, 60, 61, 62, routing=Routing(nothing, None))
    whole = batch(PROMPTS[:1], answer=(60, 61, 62))
    expected = model(**whole, routing=routing_of(whole, mask.shape[1])).logits[:, -3:]
    torch.testing.assert_close(continued, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("empty", [lambda cache: cache.reset(), lambda cache: cache.crop(-cache.get_seq_length())])
def test_an_emptied_cache_takes_the_next_prompt(empty):
    model = adapted()
    cache, _ = prefill(model, PROMPTS[:1])
    empty(cache)
    other = batch(PROMPTS[2:3])
    torch.testing.assert_close(model(**other, **{CACHE: cache}).logits, model(**other).logits, rtol=0, atol=1e-6)


def test_a_cache_under_another_name_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("a3tune.adapters.layer.CACHE", "memory")
    with pytest.raises(AdapterError, match="LlamaAttention: expected its KV cache, or None, as the keyword 'memory'"):
        adapted()(**batch())


def test_a_cache_filled_without_the_adapter_is_refused():
    model = adapted()
    with model.disable_adapter():
        cache, mask = prefill(model)
    with pytest.raises(AdapterError, match="without this adapter"):
        step(model, cache, mask, 70)


def test_decoding_steps_compute_no_gate(monkeypatch: pytest.MonkeyPatch):
    model, inputs, calls = adapted(), batch(), []
    for layer in layers_of(model, RoutedLinear):
        layer.lora_experts["default"].router.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    prefill_calls = len(calls)
    loads = gate_loads(model)
    calls.clear()
    model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert len(calls) == prefill_calls == 4
    assert torch.equal(gate_loads(model)["key"].use, loads["key"].use)


def loss_and_gradients(
    model: PeftModel, inputs: dict[str, Tensor], balance: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    labels = inputs["input_ids"].where(inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE), -100)
    loss = model(**inputs, labels=labels, routing=routing_of(inputs), use_cache=False).loss
    if balance:
        loss = loss + balance * balance_loss(model)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("balance", [0.0, 0.7])
def test_activation_checkpointing_gives_identical_gradients(balance: float):
    model, inputs = adapted(balance=bool(balance)).train(), batch()
    expected_loss, expected = loss_and_gradients(model, inputs, balance)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    layer = model.get_base_model().model.language_model.layers[0]
    runs = []
    layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    loss, gradients = loss_and_gradients(model, inputs, balance)
    assert len(runs) == 2, "the layer was not recomputed"
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert all(g.abs().max() > 0 for g in gradients)


def test_gradients_reach_the_gates_as_finite_differences_say(monkeypatch: pytest.MonkeyPatch):
    # The decoder's own norm computes in fp32 and would bound the step and the agreement.
    monkeypatch.setattr(
        LlamaRMSNorm, "forward", lambda norm, x: nn.functional.rms_norm(x, x.shape[-1:], norm.weight, 1e-6)
    )
    model, inputs = adapted().double(), batch()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    routers = [parameter for name, parameter in model.named_parameters() if ".router." in name]
    torch.manual_seed(5)
    directions = [torch.randn_like(parameter) for parameter in routers]
    probe = torch.randn(*inputs["input_ids"].shape, SHAPE["vocab"], dtype=torch.float64)

    def value(at: float) -> Tensor:
        moved = [p.detach() + at * d for p, d in zip(routers, directions, strict=True)]
        names = [name for name, _ in model.named_parameters() if ".router." in name]
        output = torch.func.functional_call(model, dict(zip(names, moved, strict=True)), (), inputs)
        return (output.logits * probe).mean()

    gradients = torch.autograd.grad((model(**inputs).logits * probe).mean(), routers)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert abs(slope) > 1e-4
    with torch.no_grad():
        torch.testing.assert_close((value(1e-6) - value(-1e-6)) / 2e-6, slope, rtol=1e-5, atol=0)


def test_balance_loss_is_one_term_per_pass_and_only_on_request():
    model, inputs = adapted(), batch()
    model(**inputs)
    with pytest.raises(AdapterError, match="balance=True"):
        balance_loss(model)
    model = adapted(balance=True)
    model(**inputs)
    assert balance_loss(model).requires_grad
    with pytest.raises(AdapterError, match="once per pass"):
        balance_loss(model)


def test_gate_loads_are_stacked_by_layer_and_detached():
    model = adapted()
    assert gate_loads(model) == {}
    model(**batch(), routing=routing_of(batch()))
    loads = gate_loads(model)
    assert {kind: tuple(load.use.shape) for kind, load in loads.items()} == {"query": (2, 3), "key": (2, 4)}
    for load in loads.values():
        assert not load.use.requires_grad
        torch.testing.assert_close(load.use.sum(-1), torch.ones(2))
        assert ((load.entropy > 0) & (load.entropy < torch.tensor(4.0).log())).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["a3moe", "lora"])
def test_save_and_load_give_the_same_model(kind: str, tmp_path: Path):
    model, inputs = adapted(kind), batch()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    expected = model(**inputs).logits
    for loaded in (
        load_adapter(base(), tmp_path),
        PeftModel.from_pretrained(base(), str(tmp_path)),
        PeftModel.from_pretrained(base(), str(tmp_path), low_cpu_mem_usage=True),
    ):
        assert (loaded(**inputs).logits - expected).abs().max() == 0.0
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = load_adapter(base(), tmp_path, trainable=True)
    assert all((".lora_" in name) == parameter.requires_grad for name, parameter in again.named_parameters())


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("a3moe", {"hidden": 64}, "'hidden_size': 32.*'hidden_size': 64"),
        ("a3moe", {"layers": 3}, "'layers': 2.*'layers': 3"),
        ("a3moe", {"vocab": 100}, "'vocab': 96.*'vocab': 100"),
        ("a3moe", {"kv_heads": 4}, r"_proj is 16 wide, that of LlavaForConditionalGeneration is 32"),
        ("lora", {"hidden": 64}, "is 96 wide, that of LlavaForConditionalGeneration is 192"),
        ("lora", {"layers": 3}, "adapts 14 layers, LlavaForConditionalGeneration has 21"),
    ],
)
def test_an_adapter_of_another_base_model_is_refused_before_the_model_is_touched(
    kind: str, shape: dict, message: str, tmp_path: Path
):
    adapted(kind).save_pretrained(tmp_path)
    other = base(**shape)
    names = [name for name, _ in other.named_modules()]
    with pytest.raises(AdapterError, match="another base model.*" + message):
        load_adapter(other, tmp_path)
    assert [name for name, _ in other.named_modules()] == names


def test_peft_itself_refuses_an_a3moe_adapter_of_another_base_model(tmp_path: Path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="another base model"):
        PeftModel.from_pretrained(base(vocab=100), str(tmp_path))


def test_broken_adapter_folders_are_refused(tmp_path: Path):
    with pytest.raises(AdapterError, match=r"adapter_config\.json, found none"):
        load_adapter(base(), tmp_path / "nowhere")
    adapted().save_pretrained(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    settings = config.read_text()
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        load_adapter(base(), tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="can run code when read"):
        load_adapter(base(), tmp_path)
    config.write_text(json.dumps(json.loads(settings) | {"peft_type": "IA3"}))
    with pytest.raises(AdapterError, match="expected an adapter of type A3MOE or LORA, got 'IA3'"):
        load_adapter(base(), tmp_path)
    config.write_text(settings[:50])
    with pytest.raises(AdapterError, match="expected a JSON object"):
        load_adapter(base(), tmp_path)


def test_disable_adapter_gives_the_base_model_and_turns_gradients_back_on():
    model, inputs = adapted(), batch()
    model.requires_grad_(False)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base()(**inputs).logits)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_unload_leaves_the_base_model_without_hooks():
    model, inputs = adapted(), batch()
    plain = model.unload()
    assert torch.equal(plain(**inputs).logits, base()(**inputs).logits)
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in base().named_modules()]


def test_several_adapters_on_one_model():
    inputs = batch()
    first, model = adapted(), adapted()
    model.add_adapter("plain", A3MoEConfig(r=4, query_experts=0, key_experts=0))
    model.add_adapter("wide", A3MoEConfig(r=4, query_experts=5, key_experts=6, top_experts=3))
    for name, parameter in model.named_parameters():
        if ".plain." in name or ".wide." in name:
            nn.init.normal_(parameter, std=0.3)
    expected = first(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    seen = [expected]
    for name, experts in (("plain", {}), ("wide", {"query": 5, "key": 6})):
        model.set_adapter(name)
        seen.append(model(**inputs).logits)
        assert {kind: load.use.shape[1] for kind, load in gate_loads(model).items()} == experts
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.pairwise(seen))
    model.set_adapter("default")
    model.delete_adapter("wide")
    assert torch.equal(model(**inputs).logits, expected)


def test_half_precision_base_keeps_fp32_adapters():
    model = add_adapter(base().to(torch.bfloat16), AdapterConfig(**SMALL))
    inputs = batch()
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    output = model(**inputs).logits
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {key: value[0] for key, value in batch(PROMPTS[3:]).items()}
        row["input_ids"] = row["input_ids"].clone()
        row["input_ids"][-1] += index
        return {**row, "labels": row["input_ids"].where(row["input_ids"] != IMAGE, -100)}


def train(folder: Path, steps: int, resume: bool = False) -> dict[str, Tensor]:
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, learning_rate=0.01, lr_scheduler_type="constant",
        per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=100, seed=1,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=adapted().train(), args=settings, train_dataset=Rows())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_trainer_resumes_to_the_same_weights(tmp_path: Path):
    straight = train(tmp_path / "straight", steps=4)
    train(tmp_path / "resumed", steps=2)
    resumed = train(tmp_path / "resumed", steps=4, resume=True)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    start = {name: p for name, p in adapted().named_parameters() if p.requires_grad}
    assert any(not torch.equal(straight[name], start[name]) for name in straight if "lora_experts" in name)


@pytest.mark.parametrize(
    "settings", [{"expert_rank": 0}, {"query_experts": -1}, {"key_experts": 4, "top_experts": 5}, {"top_experts": 0}]
)
def test_settings_out_of_range_name_the_setting(settings: dict):
    with pytest.raises((ConfigError, ValueError), match=list(settings)[-1]):
        add_adapter(base(), AdapterConfig(**settings))


@pytest.mark.parametrize("name", ["control_ids", "layout_ids"])
@pytest.mark.parametrize("ids", ["12", ["a"], [-1], [2**63], [True], None])
def test_ids_that_are_none_are_refused(name: str, ids: object):
    with pytest.raises(ConfigError, match=f"{name}: expected a list of token ids"):
        A3MoEConfig(**{name: ids})


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="'a3moe' or 'lora', got 'moe'"):
        add_adapter(base(), AdapterConfig("moe"))  # type: ignore[arg-type]


def test_models_that_cannot_be_routed_are_refused():
    text_only = LlamaForCausalLM(base().config.text_config)
    with pytest.raises(AdapterError, match="vision-language model"):
        add_adapter(text_only)
    add_adapter(text_only, AdapterConfig("lora"))
    fused = base()
    for layer in fused.model.language_model.layers:
        layer.self_attn.query = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(AdapterError, match="'q_proj'"):
        add_adapter(fused)


def test_plain_peft_calls_work():
    model = get_peft_model(base(), A3MoEConfig(r=4))
    assert torch.equal(model(**batch()).logits, base()(**batch()).logits)
    assert isinstance(LoraConfig(), type(model.peft_config["default"]).__mro__[1])


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_an_adapter_has_no_name_in_its_file_and_loads_under_any(tmp_path: Path):
    model, inputs = adapted(), batch()
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert not any(".default." in key for key in tensors_of(tmp_path))
    other = get_peft_model(base(), A3MoEConfig(r=4, query_experts=2, key_experts=2), adapter_name="first").eval()
    other.load_adapter(tmp_path, "second")
    other.set_adapter("second")
    assert torch.equal(other(**inputs).logits, expected)
    other.save_pretrained(tmp_path / "saved", selected_adapters=["second"])
    for folder in (tmp_path, tmp_path / "saved" / "second"):
        assert torch.equal(load_adapter(base(), folder)(**inputs).logits, expected)


def test_files_with_the_name_of_an_adapter_still_load(tmp_path: Path):
    model, inputs = adapted(), batch()
    model.save_pretrained(tmp_path)
    for name in ("default", "A", "router"):
        old = {
            key.replace(".lora_experts.", f".lora_experts.{name}."): value
            for key, value in tensors_of(tmp_path).items()
        }
        save_file(old, tmp_path / "adapter_model.safetensors")
        assert torch.equal(load_adapter(base(), tmp_path)(**inputs).logits, model(**inputs).logits)
        assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(**inputs).logits, model(**inputs).logits)
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["router.2.bias", "lora_experts.B.weight", "down_proj.lora_A.weight"])
@pytest.mark.parametrize("kind", ["a3moe", "lora"])
def test_an_adapter_that_lacks_tensors_or_has_others_is_refused(tmp_path: Path, kind: str, part: str):
    adapted(kind).save_pretrained(tmp_path)
    whole = tensors_of(tmp_path)
    chosen = [key for key in whole if key.endswith(part)]
    if not chosen:
        pytest.skip("plain LoRA has no such tensor")
    other = base()
    names = [name for name, _ in other.named_modules()]
    for changed in (
        {key: value for key, value in whole.items() if key != chosen[0]},
        whole | {chosen[0].replace(".lora_", ".stray.lora_"): whole[chosen[0]].clone()},
    ):
        save_file(changed, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match="first difference"):
            load_adapter(other, tmp_path)
        assert [name for name, _ in other.named_modules()] == names


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, value: float):
    adapted().save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    tensors[next(key for key in tensors if "router" in key)].view(-1)[0] = value
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"router.* holds values that are no numbers"):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize("change", ["missing", "stray", "nan", "integers"])
def test_peft_itself_takes_no_file_that_would_leave_experts_random(tmp_path: Path, change: str):
    adapted().save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    key = next(key for key in tensors if key.endswith("router.2.weight"))
    other = {
        "missing": {name: value for name, value in tensors.items() if name != key},
        "stray": tensors | {key.replace("layers.0", "layers.7"): tensors[key].clone()},
        "nan": tensors | {key: tensors[key] * float("nan")},
        "integers": tensors | {key: tensors[key].int()},
    }[change]
    save_file(other, tmp_path / "adapter_model.safetensors")
    message = {"nan": "no numbers", "integers": "expected floating-point weights"}.get(
        change, "first difference: .*router"
    )
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(base(), tmp_path)
    with pytest.raises(AdapterError, match=message):
        adapted().load_adapter(tmp_path, "second")
    with pytest.raises(AdapterError, match=re.escape(str(tmp_path))):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize("setting", ["r", "expert_rank", "query_experts", "router_hidden"])
def test_a_file_of_other_sizes_than_its_settings_is_refused_in_one_line(tmp_path: Path, setting: str):
    adapted().save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {setting: 2}))
    with pytest.raises(AdapterError, match=r"size mismatch for .*shape") as told:
        load_adapter(base(), tmp_path)
    assert len(str(told.value)) < 600 and "\n" not in str(told.value)


def test_transformers_loads_an_adapter_into_its_own_model(tmp_path: Path):
    model, inputs = adapted(), batch()
    model.save_pretrained(tmp_path)
    plain = base()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(plain.eval()(**inputs).logits, model(**inputs).logits)


def test_peft_names_our_kind_where_it_refuses_it():
    with pytest.raises(ValueError, match="'A3MOE' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base(), A3MoEConfig(r=4), mixed=True)
    with pytest.raises(ValueError, match="A3MOE"):
        adapted().add_adapter("beside", LoraConfig(r=4, target_modules=["q_proj"]))


def test_a_copy_is_a_model_of_its_own():
    """Also one that was pickled, until transformers puts functions into a model that cannot be, at its first pass."""
    model, inputs = adapted(balance=True).train(), batch()
    pickled = pickle.loads(pickle.dumps(model))  # noqa: S301
    expected = model(**inputs).logits
    copied = copy.deepcopy(model)
    shake(model, seed=8)
    for other in (pickled, copied):
        assert torch.equal(other(**inputs).logits, expected)
        assert torch.equal(other.unload().eval()(**inputs).logits, base()(**inputs).logits)


def test_routed_adapters_cannot_be_weighted(tmp_path: Path):
    model = adapted()
    model.add_adapter("plain", A3MoEConfig(r=4, query_experts=0, key_experts=0))
    with pytest.raises(AdapterError, match="'default': cannot be weighted"):
        model.add_weighted_adapter(["default", "plain"], [0.5, 0.5], "mixed", combination_type="linear")
    model.add_weighted_adapter(["plain"], [1.0], "same", combination_type="linear")
    assert "same" in model.peft_config and "mixed" not in model.peft_config


def test_a_refused_mixed_batch_leaves_the_model_as_it_was():
    model, inputs = adapted(), batch()
    expected = model(**inputs).logits
    with pytest.raises(AdapterError, match="adapter_names: A3MoE adapters cannot be mixed"):
        model(**inputs, adapter_names=["default"] * len(inputs["input_ids"]))
    assert torch.equal(model(**inputs).logits, expected)


def test_all_linear_means_the_language_model(tmp_path: Path):
    model = get_peft_model(base(), A3MoEConfig(r=4, target_modules="all-linear"))
    assert {name for name, _ in model.named_parameters() if "lora_" in name} == {
        name for name, _ in get_peft_model(base(), A3MoEConfig(r=4)).named_parameters() if "lora_" in name
    }
    assert not any("vision" in name for name, _ in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("layers", [1, [0], [0, 1]])
def test_an_adapter_of_some_layers_is_saved_and_loaded(tmp_path: Path, layers: int | list[int]):
    model = get_peft_model(base(), A3MoEConfig(r=4, layers_to_transform=layers)).eval()
    shake(model)
    chosen = {f".layers.{layer}." for layer in ([layers] if isinstance(layers, int) else layers)}
    adapted_names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert adapted_names and all(any(layer in name for layer in chosen) for name in adapted_names)
    model.save_pretrained(tmp_path)
    inputs = batch()
    assert torch.equal(load_adapter(base(), tmp_path)(**inputs).logits, model(**inputs).logits)


def test_a_prompt_in_parts_is_refused():
    model, inputs = adapted(), batch(PROMPTS[:1])
    images = int((inputs["input_ids"] == IMAGE).nonzero()[:, 1].max()) + 1  # the model takes all images in one part
    with pytest.raises(AdapterError, match="leave out prefill_chunk_size"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=images)
    whole = model.generate(**inputs, max_new_tokens=2)
    prefix = {name: value[:, :-3] for name, value in inputs.items() if name != "pixel_values"}
    cache = model(**prefix, pixel_values=inputs["pixel_values"], use_cache=True)[CACHE]
    with pytest.raises(AdapterError, match="start without a cached prefix"):
        text = {name: value for name, value in inputs.items() if name != "pixel_values"}
        model.generate(**text, **{CACHE: cache}, max_new_tokens=2)
    assert torch.equal(model.generate(**inputs, max_new_tokens=2), whole)


def test_one_token_more_of_a_prompt_is_refused_too():
    """To the layers it looks like the first token of the answer."""
    model, inputs = adapted(), batch([PROMPTS[1]])
    length = inputs["input_ids"].shape[1]
    for size in (1, length - 1):
        with pytest.raises(AdapterError, match="read a prompt in parts"):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=size)
    cache = model(**{name: value[:, :-1] for name, value in inputs.items()}, use_cache=True)[CACHE]
    with pytest.raises(AdapterError, match="start without a cached prefix"):
        model.generate(**inputs, **{CACHE: cache}, max_new_tokens=2)
    keys = adapted(query_experts=0)
    expected = keys.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(keys.generate(**inputs, max_new_tokens=4, do_sample=False, prefill_chunk_size=1), expected)


def test_generating_without_a_cache_is_refused_where_a_prompt_is_pooled():
    model, inputs = adapted(), batch(PROMPTS[:1])
    how = {"max_new_tokens": 4, "do_sample": False}
    for generate in (model.generate, model.get_base_model().generate):
        with pytest.raises(AdapterError, match="leave out use_cache=False"):
            generate(**inputs, **how, use_cache=False)
    with model.disable_adapter():
        assert torch.equal(
            model.generate(**inputs, **how, use_cache=False), base().generate(**inputs, **how, use_cache=False)
        )
    keys = adapted(query_experts=0)
    assert torch.equal(keys.generate(**inputs, **how, use_cache=False), keys.generate(**inputs, **how))
    assert torch.equal(model(**inputs, use_cache=False).logits, model(**inputs).logits)


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": base}])
def test_drafted_tokens_are_refused_where_a_prompt_is_pooled(how: dict):
    how = {name: value() if callable(value) else value for name, value in how.items()}
    inputs = {**batch(PROMPTS[:1]), "max_new_tokens": 12, "do_sample": False}
    with pytest.raises(AdapterError, match="let no other model draft tokens"):
        adapted().generate(**inputs, **how)


def test_a_load_that_fails_leaves_the_model_as_it_was(tmp_path: Path):
    adapted().save_pretrained(tmp_path)
    good = tensors_of(tmp_path)
    key = next(key for key in good if key.endswith("router.2.weight"))
    save_file(good | {key: torch.cat([good[key]] * 2)}, tmp_path / "adapter_model.safetensors")
    model, inputs = base(), batch()
    expected = model(**inputs).logits
    with pytest.raises(AdapterError, match="expected a whole adapter"):
        load_adapter(model, tmp_path)
    assert torch.equal(model(**inputs).logits, expected)
    assert not any("lora" in name for name, _ in model.named_modules())
    save_file(good, tmp_path / "adapter_model.safetensors")
    assert torch.equal(load_adapter(model, tmp_path)(**inputs).logits, adapted()(**inputs).logits)
