"""Slow, obvious loops for Eq. 2, 8, 9, 10 and 12, over the eager model's full attention; the fast code must match.

Eq. 4-7 are in `test_experts.py`.
"""

import pytest
import torch
from torch import Tensor

from a3tune.attention.align import alignment_loss, averaged_map
from a3tune.attention.capture import capture_request, stack, use_capture
from a3tune.attention.heads import HeadSelector
from a3tune.vlm.tiny import random_vlm, tiny_config

LAYERS, HEADS, SELECTED, LAMBDA = 2, 4, 3, 0.1
IMAGE_TOKEN, IMAGE_TOKENS = tiny_config().image_token_id, 9
PROMPTS = [[20, 21, *[IMAGE_TOKEN] * IMAGE_TOKENS, 22, 23, 24], [25, *[IMAGE_TOKEN] * IMAGE_TOKENS, 26]]
ANSWERS = [[30, 31], [32, 33, 34]]


def batch() -> dict[str, Tensor]:
    """Two samples, padded on the left."""
    width = max(len(prompt + answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True))
    ids, prompts, answers = torch.zeros(3, 2, width, dtype=torch.long)
    for b, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids[b, width - len(prompt + answer) :] = torch.tensor(prompt + answer)
        prompts[b, width - len(prompt + answer) : width - len(answer)] = 1
        answers[b, width - len(answer) :] = 1
    image = ids == IMAGE_TOKEN
    pixels = torch.randn(2, 3, 36, 36, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels}
    return inputs | {"image": image, "prompt": prompts.bool() & ~image, "answer": answers.bool()}


def model(implementation: str):
    vlm = random_vlm(layers=LAYERS, heads=HEADS, kv_heads=2, hidden=32, image_size=36)
    with torch.no_grad():
        for layer in vlm.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    if implementation == "a3tune":
        use_capture(vlm)
    else:
        vlm.set_attn_implementation({"text_config": implementation})
    return vlm


def forward(vlm, data: dict[str, Tensor], **keywords):
    inputs = {name: data[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    labels = data["input_ids"].masked_fill(~data["answer"], -100)
    return vlm(**inputs, labels=labels, output_attentions=True, use_cache=False, **keywords)


def segments() -> Tensor:
    """Two segments for the first sample, one for the second; the rest is padding."""
    memberships = torch.rand(2, 2, IMAGE_TOKENS, generator=torch.Generator().manual_seed(1))
    memberships[1, 1] = 0
    return memberships


def loop_rows(data: dict[str, Tensor], b: int) -> list[int]:
    """Text rows after the image: prompt text behind it, and positions whose next token is an answer token."""
    last_image = max(s for s in range(data["image"].shape[1]) if data["image"][b, s])
    rows = []
    for s in range(data["image"].shape[1]):
        is_prompt = s > last_image and bool(data["prompt"][b, s])
        predicts_answer = s + 1 < data["image"].shape[1] and bool(data["answer"][b, s + 1])
        if is_prompt or predicts_answer:
            rows.append(s)
    return rows


def loop_head(
    attentions: tuple[Tensor, ...], data: dict[str, Tensor], b: int, layer: int, h: int
) -> tuple[Tensor, Tensor]:
    """M^v_lh averaged over the rows, and r_lh (Eq. 8)."""
    rows = loop_rows(data, b)
    visual = [c for c in range(data["image"].shape[1]) if data["image"][b, c]]
    prompt = [c for c in range(data["image"].shape[1]) if data["prompt"][b, c]]
    average = {c: sum(attentions[layer][b, h, s, c] for s in rows) / len(rows) for c in visual + prompt}
    numerator = sum(average[c] for c in visual)
    denominator = sum(average[c] for c in visual + prompt)
    return torch.stack([average[c] for c in visual]), numerator / denominator  # type: ignore[arg-type]


def loop_everything(attentions: tuple[Tensor, ...], data: dict[str, Tensor], selected: int):
    """M^v (Eq. 2), r_lh (Eq. 8), M~^v (Eq. 9) and L_align (Eq. 10) per sample."""
    maps, ratios = {}, torch.zeros(2, LAYERS, HEADS)
    for b in range(2):
        for layer in range(LAYERS):
            for h in range(HEADS):
                maps[b, layer, h], ratios[b, layer, h] = loop_head(attentions, data, b, layer, h)
    mean_ratio = {
        (layer, h): float(ratios[:, layer, h].detach().mean()) for layer in range(LAYERS) for h in range(HEADS)
    }
    top = sorted(mean_ratio, key=lambda lh: mean_ratio[lh], reverse=True)[:selected]
    everything, refined, losses = [], [], []
    for b in range(2):
        everything.append(sum(maps[b, layer, h] for layer in range(LAYERS) for h in range(HEADS)) / (LAYERS * HEADS))
        refined.append(sum(maps[b, layer, h] for layer, h in top) / selected)
        losses.append(loop_loss(refined[b], segments()[b]))
    return torch.stack(everything), ratios, set(top), torch.stack(refined), torch.stack(losses)


def loop_loss(attention: Tensor, memberships: Tensor) -> Tensor:
    """Eq. 10."""
    loss = torch.tensor(0.0)
    for segment in memberships:
        if segment.sum() > 0:
            inside = sum(segment[c] * attention[c] for c in range(IMAGE_TOKENS))
            loss = loss + (1 - inside / sum(attention[c] for c in range(IMAGE_TOKENS))) ** 2
    return loss


def fast_captured(vlm, data: dict[str, Tensor], **options):
    request = capture_request("after_image", data["image"], data["prompt"], data["answer"], **options)
    out = forward(vlm, data, capture=request)
    return out, stack(out.attentions, request)


def test_equations_2_8_9_10():
    data = batch()
    with torch.no_grad():
        everything, ratios, top, refined, losses = loop_everything(
            forward(model("eager"), data).attentions, data, SELECTED
        )
        _, captured = fast_captured(model("a3tune"), data)
    torch.testing.assert_close(averaged_map(captured.map_BLHN, torch.ones(LAYERS, HEADS).bool()), everything)
    torch.testing.assert_close(captured.ratio_BLH, ratios)
    heads = HeadSelector(SELECTED).select(captured.ratio_BLH, captured.counted_B)
    assert {tuple(pair) for pair in heads.nonzero().tolist()} == top
    assert top != {(0, h) for h in range(SELECTED)}, "the choice must not be the one that ties would give"
    torch.testing.assert_close(averaged_map(captured.map_BLHN, heads), refined)
    torch.testing.assert_close(alignment_loss(averaged_map(captured.map_BLHN, heads), segments()), losses)


def test_equation_10_as_the_published_code_has_it():
    data = batch()
    with torch.no_grad():
        attentions = forward(model("eager"), data).attentions
        _, captured = fast_captured(model("a3tune"), data, each_row=True)
    heads = torch.ones(LAYERS, HEADS).bool()
    losses = []
    for b in range(2):
        visual, rows = data["image"][b].nonzero().flatten(), loop_rows(data, b)
        full_ST = torch.stack(attentions).mean((0, 2))[b]
        losses.append(sum(loop_loss(full_ST[s, visual], segments()[b]) for s in rows) / len(rows))
    actual = alignment_loss(averaged_map(captured.map_BLHN, heads), segments(), "code")
    torch.testing.assert_close(actual, torch.stack(losses))


@pytest.mark.parametrize("weight", [0.0, LAMBDA, 10.0])
def test_equation_12_and_its_gradient(weight):
    data = batch()
    slow, fast = model("eager"), model("a3tune")
    reference = forward(slow, data)
    slow_total = reference.loss + weight * loop_everything(reference.attentions, data, SELECTED)[-1].mean()
    out, captured = fast_captured(fast, data)
    heads = HeadSelector(SELECTED).select(captured.ratio_BLH, captured.counted_B)
    fast_total = out.loss + weight * alignment_loss(averaged_map(captured.map_BLHN, heads), segments()).mean()
    torch.testing.assert_close(fast_total, slow_total)
    slow_total.backward()
    fast_total.backward()
    for (name, actual), expected in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert (actual.grad is None) == (expected.grad is None), name
        if expected.grad is not None:
            tolerance = 1e-5 * max(1.0, float(expected.grad.abs().max()))
            torch.testing.assert_close(actual.grad, expected.grad, rtol=0, atol=tolerance)
