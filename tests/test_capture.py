"""The captured attention against the eager model's own, values and gradients."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

from a3tune.attention import capture as capture_module
from a3tune.attention.capture import (
    ATTENTION,
    CaptureRequest,
    attention_forward,
    capture_request,
    check_captured,
    stack,
    use_capture,
)
from a3tune.errors import ConfigError, ModelError
from a3tune.vlm.tiny import random_vlm, tiny_config

IMAGE_TOKEN, IMAGE_TOKENS, IMAGE_SIZE = tiny_config().image_token_id, 9, 36
IMAGE = [IMAGE_TOKEN] * IMAGE_TOKENS


def text(length: int, seed: int) -> list[int]:
    return torch.randint(10, 600, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


SAMPLES = [
    ([*text(2, 0), *IMAGE, *text(5, 1)], text(3, 2)),  # image early
    ([*text(6, 3), *IMAGE, *text(1, 4)], text(1, 5)),  # image late
    ([*text(1, 6), *IMAGE, *text(4, 7), *IMAGE, *text(2, 8)], text(2, 9)),  # two images
    (text(7, 10), text(4, 11)),  # no image
]


def make_batch(side: str = "left", samples: list = SAMPLES) -> dict[str, Tensor]:
    width = max(len(prompt) + len(answer) for prompt, answer in samples)
    names = ("input_ids", "attention_mask", "prompt_mask", "answer_mask")
    batch = {name: torch.zeros(len(samples), width, dtype=torch.long) for name in names}
    for row, (prompt, answer) in enumerate(samples):
        length = len(prompt) + len(answer)
        start = width - length if side == "left" else 0
        batch["input_ids"][row, start : start + length] = torch.tensor(prompt + answer)
        batch["attention_mask"][row, start : start + length] = 1
        batch["prompt_mask"][row, start : start + len(prompt)] = 1
        batch["answer_mask"][row, start + len(prompt) : start + length] = 1
    image_mask = batch["input_ids"] == IMAGE_TOKEN
    images = int(image_mask.sum()) // IMAGE_TOKENS
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "pixel_values": torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)),
        "image_mask": image_mask,
        "prompt_mask": batch["prompt_mask"].bool() & ~image_mask,
        "answer_mask": batch["answer_mask"].bool(),
    }


def make_request(batch: dict[str, Tensor], rows: str = "after_image", **options) -> CaptureRequest:
    masks = {name: batch[name] for name in ("image_mask", "prompt_mask", "answer_mask", "attention_mask")}
    return capture_request(rows, **masks, **options)  # type: ignore[arg-type]


def make_model(implementation: str = ATTENTION, kv_heads: int = 4):
    model = random_vlm(kv_heads=kv_heads, layers=2, hidden=64, image_size=IMAGE_SIZE)
    # Random weights of the usual size look everywhere alike; larger ones make peaked, different heads.
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    if implementation == ATTENTION:
        use_capture(model)
    else:
        model.set_attn_implementation({"text_config": implementation})
    return model


def run(model, batch: dict[str, Tensor], request: CaptureRequest | None = None, **options):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    labels = batch["input_ids"].masked_fill(~batch["answer_mask"], -100)
    keywords = {} if request is None else {"capture": request}
    return model(**inputs, labels=labels, output_attentions=True, use_cache=False, **keywords, **options)


def packed_from_full(attention_BHST: Tensor, request: CaptureRequest) -> Tensor:
    """The definition, one sample and one group at a time."""
    grouped = request.row_weights.ndim == 3
    samples = []
    for b, attention_HST in enumerate(attention_BHST):
        weights_GS = request.row_weights[b] if grouped else request.row_weights[b][None]
        # Masked, not multiplied: eager fills padded rows with numbers of no meaning.
        average_HGT = torch.einsum("hst,gs->hgt", attention_HST, weights_GS)
        columns = request.columns[b].tolist()
        marked = set(request.text_columns[b].nonzero().flatten().tolist()) | {c for c in columns if c >= 0}
        parts = [average_HGT[..., c] if c >= 0 else torch.zeros_like(average_HGT[..., 0]) for c in columns]
        parts.append(average_HGT[..., sorted(marked)].sum(-1))
        samples.append(torch.stack(parts, dim=-1))
    packed_BHGN = torch.stack(samples)
    return packed_BHGN if grouped else packed_BHGN.squeeze(2)


def gradients(model, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def random_like(packed: Tensor) -> Tensor:
    return torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # Relative to the tensor's largest entry: the small ones are differences of larger terms.
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kv_heads", [8, 4, 2])
@pytest.mark.parametrize(("rows", "each_row"), [("after_image", False), ("after_image", True), ("answer", False)])
def test_equals_the_eager_models_own_attention(side, kv_heads, rows, each_row):
    batch = make_batch(side)
    request = make_request(batch, rows, each_row=each_row)
    ours, eager = make_model(kv_heads=kv_heads), make_model("eager", kv_heads)
    out, reference = run(ours, batch, request), run(eager, batch)
    expected = [packed_from_full(layer, request) for layer in reference.attentions]
    assert len(out.attentions) == len(expected) == 2
    ours_loss, reference_loss = out.loss, reference.loss
    for actual, wanted in zip(out.attentions, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
        ours_loss = ours_loss + (actual * random_like(wanted)).sum()
        reference_loss = reference_loss + (wanted * random_like(wanted)).sum()
    assert_close(gradients(ours, ours_loss), gradients(eager, reference_loss), 1e-5)


def test_the_gradient_of_the_capture_itself_reaches_the_vision_tower():
    batch = make_batch()
    model = make_model()
    out = run(model, batch, make_request(batch))
    grads = gradients(model, out.attentions[0][..., :-1].square().sum())
    assert grads["model.multi_modal_projector.linear_1.weight"].abs().sum() > 0
    assert "model.language_model.layers.1.self_attn.q_proj.weight" not in grads


def test_exact_gradients_in_double_precision():
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 4, 5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    key = torch.randn(2, 2, 7, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = torch.rand(2, 1, 5, 7, generator=generator) < 0.7
    rows, weights = torch.tensor([[1, 4], [2, 0]]), torch.tensor([[[0.3, 0.7]], [[1.0, 0.0]]]).double()
    columns, denominator = torch.tensor([[0, 5, -1], [6, 1, 2]]), torch.zeros(2, 7).double()
    denominator[0, [0, 3, 5]] = denominator[1, [1, 2, 6]] = 1

    def captured(query, key):
        return capture_module._RowAttention.apply(query, key, mask, rows, weights, columns, denominator, 0.5, False)

    torch.autograd.gradcheck(captured, (query, key))


def test_logits_are_those_of_sdpa_with_and_without_a_request():
    batch = make_batch()
    expected = run(make_model("sdpa"), batch).logits
    model = make_model()
    assert torch.equal(run(model, batch).logits, expected)
    assert torch.equal(run(model, batch, make_request(batch)).logits, expected)


def test_without_padding_the_mask_is_none_and_capture_is_causal():
    batch = make_batch(samples=SAMPLES[:1])
    request = make_request(batch)
    masks = []
    model = make_model()
    layer = model.model.language_model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda _m, _a, kw: masks.append(kw["attention_mask"]), with_kwargs=True)
    out = run(model, batch, request)
    assert masks == [None]
    reference = run(make_model("eager"), batch)
    for actual, full in zip(out.attentions, reference.attentions, strict=True):
        torch.testing.assert_close(actual, packed_from_full(full, request), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("each_row", [False, True])
def test_tiles_of_any_size_give_the_same(monkeypatch, each_row):
    batch = make_batch()
    request = make_request(batch, each_row=each_row)
    results = []
    for tile_bytes in (1, 20_000, 10**9):
        monkeypatch.setattr(capture_module, "TILE_BYTES", tile_bytes)
        model = make_model()
        out = run(model, batch, request)
        loss = sum((layer * random_like(layer)).sum() for layer in out.attentions)
        results.append((out.attentions, gradients(model, loss)))
    for attentions, grads in results[1:]:
        torch.testing.assert_close(attentions, results[0][0], rtol=1e-5, atol=1e-6)
        assert_close(grads, results[0][1], 1e-5)


def plain_module(is_causal: bool = True) -> torch.nn.Module:
    module = torch.nn.Module()
    module.is_causal, module.layer_idx, module.num_key_value_groups = is_causal, 0, 1  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("forbidden", [False, -torch.inf, torch.finfo(torch.float32).min])
def test_fully_masked_rows_give_zeros_and_finite_gradients(forbidden):
    query, key = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(2))
    allowed = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    allowed[:, :, 2] = False
    mask = allowed if forbidden is False else torch.zeros(1, 1, 4, 4).masked_fill(~allowed, forbidden)
    request = CaptureRequest(torch.eye(4)[None, 2:], torch.tensor([[0, 1]]), torch.tensor([[False] * 3 + [True]]))
    _, packed = attention_forward(plain_module(), query, key, key.detach(), mask, capture=request, scaling=8**-0.5)
    assert packed is not None
    assert torch.equal(packed[:, :, 0], torch.zeros(1, 2, 3))
    assert packed[:, :, 1].min() > 0
    packed.square().sum().backward()
    assert query.grad is not None and key.grad is not None
    assert query.grad.isfinite().all() and key.grad.isfinite().all()
    assert query.grad[:, :, 3].abs().sum() > 0 and query.grad[:, :, 2].abs().sum() == 0


def test_an_additive_bias_is_added():
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8)
    bias = torch.randn(2, 1, 3, 3)
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    request = CaptureRequest(weights, torch.tensor([[0], [2]]), torch.zeros(2, 3, dtype=torch.bool))
    _, packed = attention_forward(plain_module(), query, key, key, bias, capture=request, scaling=0.25)
    full = (query @ key.mT * 0.25 + bias).softmax(-1)
    torch.testing.assert_close(packed, packed_from_full(full, request), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [torch.zeros(4, 26), torch.zeros(4, 2, 26)])
def test_no_rows_or_no_images_give_zeros_and_still_train(weights):
    batch = make_batch()
    model = make_model()
    weights = torch.zeros(*weights.shape[:-1], batch["input_ids"].shape[1])
    out = run(model, batch, dataclasses.replace(make_request(batch), row_weights=weights))
    check_captured(out.attentions, model)
    assert all(layer.abs().sum() == 0 for layer in out.attentions)
    blind = make_batch(samples=SAMPLES[3:])
    request = make_request(blind, "answer")
    inputs = {name: blind[name] for name in ("input_ids", "attention_mask")}
    captured = stack(model(**inputs, capture=request, output_attentions=True).attentions, request)
    assert captured.map_BLHN.shape == (1, 2, 8, 0)
    assert captured.ratio_BLH.abs().sum() == 0 and not captured.counted_B.any()
    grads = gradients(model, captured.ratio_BLH.sum())
    assert all(grad.isfinite().all() for grad in grads.values())


def test_non_reentrant_checkpointing_changes_nothing():
    batch = make_batch()
    request = make_request(batch)
    results = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        out = run(model, batch, request)
        check_captured(out.attentions, model)
        loss = out.loss + sum((layer * random_like(layer)).sum() for layer in out.attentions)
        results.append(gradients(model, loss))
    assert_close(results[1], results[0], 0.0)


@pytest.mark.parametrize("every_n_layers", [1, 2])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused_by_name(every_n_layers):
    batch = make_batch()
    model = make_model().train()
    model.activation_checkpointing_enable({"use_reentrant": True}, every_n_layers=every_n_layers)
    out = run(model, batch, make_request(batch))
    with pytest.raises(ModelError, match=r"Reentrant activation checkpointing .*use_reentrant"):
        check_captured(out.attentions, model)


def test_frozen_early_layers_and_inference_are_fine():
    batch = make_batch()
    model = make_model().requires_grad_(False)
    check_captured(run(model, batch, make_request(batch)).attentions, model)
    model.model.language_model.layers[1].self_attn.q_proj.requires_grad_(True)
    check_captured(run(model, batch, make_request(batch)).attentions, model)
    model.requires_grad_(False).lm_head.requires_grad_(True)
    with pytest.raises(ModelError, match="no gradient reaches the maps of layers 1,"):
        check_captured(run(model, batch, make_request(batch)).attentions, model)


def test_without_our_attention_the_error_says_what_to_call():
    batch = make_batch()
    request = make_request(batch)
    for implementation, message in (("sdpa", "call use_capture"), ("eager", "call use_capture")):
        with pytest.raises(ModelError, match=message):
            stack(run(make_model(implementation), batch, request).attentions, request)
    with pytest.raises(ModelError, match="output_attentions=True"):
        check_captured(run(make_model(), batch).attentions, make_model())


def test_double_backward_is_refused():
    batch = make_batch(samples=SAMPLES[:1])
    model = make_model()
    weight = model.model.language_model.layers[1].self_attn.q_proj.weight
    # Only the captured map depends on the last layer's queries here.
    loss = run(model, batch, make_request(batch)).attentions[1].square().sum()
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_use_capture_leaves_the_vision_tower_alone_and_refuses_text_models():
    model = make_model()
    assert model.model.language_model.config._attn_implementation == ATTENTION
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    with pytest.raises(ModelError, match="text_config"):
        use_capture(model.model.language_model)


def test_generate_brings_out_the_last_position_of_every_step():
    batch = make_batch("left", [(prompt, []) for prompt, _ in SAMPLES])
    request = make_request(batch, "prompt")
    model = make_model()

    def last_row(_module, args, kwargs):
        embeddings = kwargs["inputs_embeds"]
        weights = torch.zeros(embeddings.shape[:2])
        weights[:, -1] = 1
        return args, kwargs | {"capture": dataclasses.replace(request, row_weights=weights)}

    hook = model.model.language_model.register_forward_pre_hook(last_row, with_kwargs=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(**inputs, **options, output_attentions=True)
    hook.remove()
    assert len(out.attentions) == 4
    eager = make_model("eager")
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 4, dtype=torch.long)], dim=1)
    full = eager(out.sequences, attention_mask=mask, pixel_values=batch["pixel_values"], output_attentions=True)
    prompt_length = batch["input_ids"].shape[1]
    for step, layers in enumerate(out.attentions):
        for layer, full_BHST in zip(layers, full.attentions, strict=True):
            row = full_BHST[:, :, prompt_length - 1 + step : prompt_length + step]
            wanted = packed_from_full(row, dataclasses.replace(request, row_weights=torch.ones(4, 1)))
            torch.testing.assert_close(layer, wanted, rtol=1e-5, atol=1e-5)


def test_bf16_is_summed_in_fp32():
    batch = make_batch()
    request = make_request(batch)
    reference = stack(run(make_model(), batch, request).attentions, request)
    model = make_model().to(torch.bfloat16)
    out = run(model, batch | {"pixel_values": batch["pixel_values"].bfloat16()}, request)
    captured = stack(out.attentions, request)
    assert captured.map_BLHN.dtype == torch.float32
    torch.testing.assert_close(captured.ratio_BLH, reference.ratio_BLH, atol=0.03, rtol=0.05)
    grads = gradients(model, captured.map_BLHN.square().sum())
    assert all(grad.isfinite().all() for grad in grads.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(make_model(), batch, request).attentions
    assert mixed[0].dtype == torch.float32
    torch.testing.assert_close(stack(mixed, request).ratio_BLH, reference.ratio_BLH, atol=0.03, rtol=0.05)


def test_scores_of_half_precision_inputs_are_not_rounded():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 6, 64, generator=generator).bfloat16() * 3 for _ in range(2))
    request = CaptureRequest(torch.eye(6)[None, 3:], torch.tensor([[0, 1, 2]]), torch.zeros(1, 6, dtype=torch.bool))
    exact = (query.double() @ key.double().mT / 8).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf).softmax(-1)
    wanted = packed_from_full(exact.float(), request)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            _, packed = attention_forward(plain_module(), query, key, key, None, capture=request, scaling=1 / 8)
        torch.testing.assert_close(packed, wanted, rtol=1e-5, atol=1e-6)


def test_a_sliding_window_that_dropped_keys_is_refused():
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 6, 8)
    request = CaptureRequest(torch.ones(1, 1), torch.tensor([[2, 3]]), torch.ones(1, 4, dtype=torch.bool))
    call = partial(attention_forward, plain_module(), query, key, key, None, capture=request, scaling=1.0)
    assert call()[1] is not None
    assert call(sliding_window=7)[1] is not None
    with pytest.raises(ModelError, match=r"layer 0.*sliding window of 6"):
        call(sliding_window=6)
    # Eight positions, the first two dropped: columns 2 and 3 are the cache's first, text columns 0 and 1 are gone.
    packed = call(sliding_window=6, capture=dataclasses.replace(request, length=8))[1]
    moved = CaptureRequest(torch.ones(1, 1), torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(packed, call(capture=moved)[1])
    packed = call(sliding_window=6, capture=dataclasses.replace(request, length=9))[1]
    assert packed[..., 0].eq(0).all() and packed[..., 1].gt(0).all()
    far = dataclasses.replace(request, columns=torch.tensor([[2, 9]]))
    with pytest.raises(ModelError, match="10 key positions, but this layer sees 6"):
        call(capture=far)
    with pytest.raises(ModelError, match="8 key positions, but this layer sees 6"):
        call(capture=dataclasses.replace(request, length=8))  # dropped without a word of a window
    with pytest.raises(TypeError, match="scaling"):
        attention_forward(plain_module(), query, key, key, None, capture=request)  # type: ignore[call-arg]
    with pytest.raises(ModelError, match="row_weights are for 2 positions"):
        call(capture=dataclasses.replace(request, row_weights=torch.ones(1, 2)))


def test_rows_are_those_of_the_architecture_page():
    #                t  I  I  t  I  t  t  a  a  pad
    image = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 0, 0, 0]]).bool()
    prompt = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0, 0, 0]]).bool()
    answer = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, 0]]).bool()
    rows = {name: capture_request(name, image, prompt, answer) for name in ("prompt", "answer", "after_image")}
    chosen = {name: request.row_weights[0].nonzero().flatten().tolist() for name, request in rows.items()}
    assert chosen == {"prompt": [3, 5, 6], "answer": [6, 7], "after_image": [3, 5, 6, 7]}
    assert all(request.row_weights.sum() == 1 for request in rows.values())
    assert rows["answer"].columns.tolist() == [[1, 2, 4]]
    assert torch.equal(rows["answer"].text_columns, prompt)
    each = capture_request("after_image", image, prompt, answer, each_row=True).row_weights
    assert each.argmax(-1).tolist() == [[3, 5, 6, 7]] and torch.equal(each.sum(-1), torch.ones(1, 4))
    with pytest.raises(ConfigError, match="after_image, answer, prompt"):
        capture_request("all", image, prompt, answer)  # type: ignore[arg-type]


def test_image_tokens_without_a_place_are_no_columns():
    batch = make_batch()
    placed = batch["image_mask"].clone()
    placed[0, placed[0].nonzero()[3]] = False
    placed[2, placed[2].nonzero()[0]] = False
    request, everything = make_request(batch, placed_mask=placed), make_request(batch)
    assert request.columns.shape == everything.columns.shape  # maps stay in the order of the image tokens
    changed = (request.columns != everything.columns).nonzero().tolist()
    assert changed == [[0, 3], [2, 0]] and request.columns[0, 3] == request.columns[2, 0] == -1
    captured, full = (stack(run(make_model(), batch, asked).attentions, asked) for asked in (request, everything))
    assert captured.map_BLHN[0, ..., 3].eq(0).all() and full.map_BLHN[0, ..., 3].gt(0).all()
    torch.testing.assert_close(captured.map_BLHN[0, ..., :3], full.map_BLHN[0, ..., :3])
    assert (captured.ratio_BLH[0] < full.ratio_BLH[0]).all()


def test_positions_outside_the_attention_mask_count_for_nothing():
    batch = make_batch("right")
    kept = batch["attention_mask"].clone()
    kept[0, :4] = 0
    request = make_request(batch | {"attention_mask": kept})
    assert request.columns[0].max() >= 0 and (request.columns[0][request.columns[0] >= 0] >= 4).all()
    assert not request.text_columns[0, :4].any() and request.row_weights[0, :4].sum() == 0
    assert request.columns[3].tolist() == [-1] * request.columns.shape[1]


def test_only_the_used_rows_are_computed():
    batch = make_batch()
    rows, weights = make_request(batch, "answer").used_rows
    assert rows.shape == (4, 4) and weights.shape == (4, 1, 4)
    assert weights[1, 0].tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 1))


def test_the_ratio_of_stack_is_a_share_and_counts_the_right_samples():
    batch = make_batch()
    request = make_request(batch)
    captured = stack(run(make_model(), batch, request).attentions, request)
    assert captured.counted_B.tolist() == [True, True, True, False]
    ratio = captured.ratio_BLH[:3]
    assert ((ratio > 0) & (ratio < 1)).all()
    assert captured.ratio_BLH[3].abs().sum() == 0 and captured.map_BLHN[3].abs().sum() == 0
    assert captured.map_BLHN[0, ..., IMAGE_TOKENS:].abs().sum() == 0  # padding of a sample with one image
