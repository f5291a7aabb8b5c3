"""What every family must be able to do: one function per claim of docs/families.md.

A check takes the folder of a model, raises AssertionError where the family fails it, and returns the number that the
table shows.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature, DynamicCache, GenerationConfig

from a3tune.adapters import Routing, add_adapter, load_adapter
from a3tune.adapters.layer import RoutedKey, RoutedQuery
from a3tune.adapters.routing import is_markup
from a3tune.attention.capture import CaptureRequest, capture_request
from a3tune.compat.generation import CACHE
from a3tune.config import AdapterConfig
from a3tune.vlm.encode import TOKEN_MASKS, encode, end_token_id, prepare
from a3tune.vlm.grids import token_boxes
from a3tune.vlm.load import Vlm, load_vlm
from a3tune.vlm.patches import members, paint, token_weights

SIZES = ((48, 64), (90, 30), (64, 64), (33, 150), (150, 21), (3, 60), (200, 7), (1, 1))
"""(height, width) of images: usual ones, long ones, tiny ones."""
ADAPTER: dict[str, Any] = {"rank": 2, "expert_rank": 2, "query_experts": 3, "key_experts": 4, "router_hidden": 8}
PROMPTS, ANSWERS = ("Where is the lesion?", "What?", "<image> What is shown in the liver?"), ("left lung", "no", "yes")


def load(folder: Path, *, attention: bool = True, device: str = "cpu", dtype: torch.dtype | None = None) -> Vlm:
    """The model with peaked attention: random weights of the usual size look everywhere alike."""
    vlm = load_vlm(folder, device=device, dtype=dtype, attention=attention)
    with torch.no_grad():
        for name, weight in vlm.model.get_decoder().named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "q_norm")):
                weight.mul_(5)
    return vlm


def adapted(folder: Path) -> Vlm:
    """The model with an adapter whose every weight matters."""
    vlm = load(folder)
    ids = {"control_ids": vlm.control_ids, "layout_ids": vlm.layout_ids}
    model = add_adapter(vlm.model, AdapterConfig(**ADAPTER), **ids).eval()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                nn.init.normal_(weight, std=0.3)
    return Vlm(model, vlm.processor, vlm.name)  # type: ignore[arg-type]


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def batch(vlm: Vlm, side: str = "right", *, answers: Sequence[str] | None = ANSWERS) -> tuple[dict, dict]:
    """Inputs and masks of three samples whose images differ in size."""
    images = [noise(*size, seed) for seed, size in enumerate(SIZES[:3])]
    return split(encode(vlm, images, PROMPTS, answers, padding_side=side))  # type: ignore[arg-type]


def split(encoded: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    encoded = dict(encoded)
    return encoded, {name: encoded.pop(name) for name in TOKEN_MASKS}


def boxes(folder: Path) -> float:
    """As many boxes as image tokens and features, at every size; those with a place show some of the image."""
    vlm = load_vlm(folder, device="cpu")
    for size in SIZES:
        # The model itself refuses image tokens and features that differ in number.
        inputs, masks = split(encode(vlm, [noise(*size)], ["What?"]))
        with torch.no_grad():
            vlm.model(**inputs)
        found = token_boxes(vlm, *size)
        assert len(found) == masks["image_mask"].sum(), size
        assert torch.equal(masks["placed_mask"].nonzero()[:, 1], masks["image_mask"].nonzero()[:, 1][placed(found)])
        assert placed(found).any() and (found[placed(found), 2:] > found[placed(found), :2]).all(), size
    return 0.0


def placed(found: np.ndarray) -> np.ndarray:
    return ~np.isnan(found[:, 0])


def geometry(folder: Path) -> float:
    """Other pixels in one token's box change that token most (or one that they cover as well); a mask of the box goes
    to that token and comes back to its pixels. Returns the smallest overlap (IoU) of mask and picture."""
    vlm = load_vlm(folder, device="cpu")
    _without_mixing(vlm)
    overlaps = []
    for height, width in ((180, 240), (300, 90)):
        found = token_boxes(vlm, height, width)
        inside = np.clip(found, 0, [width, height, width, height])
        whole = np.flatnonzero(placed(found) & (np.abs(inside - found) < 0.01).all(1))
        chosen = whole[np.linspace(0, len(whole) - 1, 5).astype(int)]
        masks = np.zeros((len(chosen), height, width), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, np.round(inside[chosen]).astype(int), strict=True):
            mask[y0:y1, x0:x1] = True
        change = _change(vlm, masks)
        covered, area = token_weights(masks, found), np.prod(found[:, 2:] - found[:, :2], axis=1)
        for row, token in enumerate(chosen):
            # Where views of two scales lie over each other, a part of a large token may change more than a small one.
            peers = whole[np.abs(np.log2(area[whole] / area[token])) < 1]
            most = peers[change[row, peers].argmax()]
            case = f"{height} x {width}, token {token}: "
            assert covered[row, most] > 0.8, f"{case}its paint changes {most} most, and covers {covered[row, most]:.2f}"
            assert change[row, token] > 0.6, f"{case}its paint changes it by {change[row, token]:.2f}"
            assert members(covered[row])[token], f"{case}does not hold its own box"
            picture = paint(members(covered[row]), found, (height, width)) > 0
            overlaps.append((picture & masks[row]).sum() / (picture | masks[row]).sum())
    assert min(overlaps) > 0.5, f"smallest overlap {min(overlaps):.2f}"
    return float(min(overlaps))


def _without_mixing(vlm: Vlm) -> None:
    """Take attention out of the vision tower: a token then sees its own patches only."""

    def silence(module: nn.Module, args: tuple, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    text = set(vlm.model.get_decoder().modules())
    for module in vlm.model.modules():
        if module not in text and type(module).__name__.endswith("Attention"):
            module.register_forward_hook(silence)


class _Reached(Exception):  # noqa: N818
    """Carries what the language model would have read."""


def _change(vlm: Vlm, masks: np.ndarray) -> np.ndarray:
    """How much other pixels under each mask change each image token on its way into the language model, as a share of
    its change when all pixels are others: `[masks, N]`."""
    height, width = masks.shape[1:]
    # Coarse noise survives the resize; on plain ground the towers' norms would blow up the slightest change.
    coarse = (np.asarray(noise(height // 3 + 1, width // 3 + 1, seed)) for seed in (0, 1))
    ground, other = (pixels.repeat(3, axis=0).repeat(3, axis=1)[:height, :width] for pixels in coarse)
    pictures = [ground, other, *(np.where(mask[..., None], other, ground) for mask in masks)]
    inputs, found = split(encode(vlm, [Image.fromarray(picture) for picture in pictures], ["What?"] * len(pictures)))

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _Reached(kwargs["inputs_embeds"])

    hook = vlm.model.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            vlm.model(**inputs)
        raise AssertionError("the language model was not called")
    except _Reached as reached:
        states = reached.args[0]
    finally:
        hook.remove()
    seen = states[found["image_mask"]].view(len(pictures), -1, states.shape[-1])
    change = (seen[1:] - seen[:1]).norm(dim=-1).nan_to_num()
    return (change[1:] / change[:1].clamp_min(0.1 * change.max())).numpy()


def masks_exact(folder: Path) -> float:
    """Prompt, answer, image, markup and padding share out every position; the texts come back. Between two tokens of an
    image nothing is prompt."""
    vlm = load_vlm(folder, device="cpu")
    for side in ("left", "right"):
        inputs, masks = batch(vlm, side)
        ids, image, prompt, answer = inputs["input_ids"], *(masks[name] for name in TOKEN_MASKS[:3])
        markup = is_markup(ids, image, vlm.control_ids, vlm.layout_ids) & inputs["attention_mask"].bool()
        markup &= ~image & ~answer
        assert torch.equal(image.int() + prompt.int() + answer.int() + markup.int(), inputs["attention_mask"].int())
        for row in range(len(ids)):
            places = image[row].nonzero()
            assert not prompt[row, places.min() : places.max()].any(), vlm.tokenizer.decode(ids[row])
            asked, answered = vlm.tokenizer.decode(ids[row][prompt[row]]), ids[row][answer[row]]
            assert PROMPTS[row].removeprefix("<image>").strip() in asked, asked
            assert vlm.tokenizer.decode(answered[:-1]).strip() == ANSWERS[row] and answered[-1] == end_token_id(vlm)
            assert image[row].sum() == len(token_boxes(vlm, *SIZES[row]))
        assert torch.equal(inputs["labels"], ids.where(answer, -100))
    return 0.0


def capture_equals_eager(folder: Path, side: str) -> float:
    """Logits and captured attention of a padded batch are those of the eager model."""
    logits, maps = capture_beside_eager(folder, side)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-3)
    return max(_differ(*pair) for pair in maps)


def capture_beside_eager(
    folder: Path, side: str, device: str = "cpu", dtype: torch.dtype | None = None
) -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
    """Of a padded batch the logits of our model and of the eager one, and of every layer what was captured and what is
    expected."""
    ours, eager = (load(folder, attention=attention, device=device, dtype=dtype) for attention in (True, False))
    eager.model.set_attn_implementation({"text_config": "eager"})
    inputs, masks = (BatchFeature(part).to(device, ours.model.dtype) for part in batch(ours, side))
    request = capture_request("after_image", **masks)
    run = partial(_run, inputs=inputs, output_attentions=True)
    with torch.no_grad():
        out, reference = run(ours.model, capture=request), run(eager.model)
    real = inputs["attention_mask"].bool()
    assert len(out.attentions) == len(reference.attentions) == ours.model.config.get_text_config().num_hidden_layers
    maps = [
        (actual, _expected(full.to(actual), request))
        for actual, full in zip(out.attentions, reference.attentions, strict=True)
    ]
    return (out.logits[real], reference.logits[real]), maps


def _run(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    return model(**inputs, use_cache=False, **options)


def _expected(attention_BHST: Tensor, request: CaptureRequest) -> Tensor:
    """What `capture` promises, from the full attention."""
    # Masked, not multiplied: eager fills padded rows with numbers of no meaning.
    average = torch.einsum("bhst,bs->bht", attention_BHST.nan_to_num(), request.row_weights)
    columns = request.columns[:, None].expand(-1, average.shape[1], -1)
    image = average.gather(-1, columns.clamp_min(0)) * columns.ge(0)
    text = (average * request.text_columns[:, None]).sum(-1, keepdim=True)
    return torch.cat([image, text + image.sum(-1, keepdim=True)], dim=-1)


def _differ(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> float:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
    return float((actual - expected).abs().max())


def capture_with_cache(folder: Path) -> float:
    """The attention captured at a decoding step is that of one pass over the whole sequence, in every layer."""
    vlm = load(folder)
    inputs, masks = split(encode(vlm, [noise(*SIZES[0])], PROMPTS[:1], ANSWERS[:1]))
    del inputs["labels"]
    request = capture_request("answer", **masks)
    length = inputs["input_ids"].shape[1]
    is_last = nn.functional.one_hot(torch.tensor([length - 1]), length)
    last = CaptureRequest(is_last, request.columns, masks["prompt_mask"])
    step = CaptureRequest(torch.ones(1, 1), request.columns, masks["prompt_mask"], length=length)
    cache = DynamicCache(config=vlm.model.config.get_text_config())
    aligned = {name for name, value in inputs.items() if value.shape == inputs["input_ids"].shape}
    with torch.no_grad():
        whole = _run(vlm.model, inputs, capture=last, output_attentions=True)
        vlm.model(**{n: v[:, :-1] if n in aligned else v for n, v in inputs.items()}, **{CACHE: cache})
        decoded = vlm.model(
            input_ids=inputs["input_ids"][:, -1:],
            position_ids=_position(vlm, length),
            **{CACHE: cache},
            capture=step,
            output_attentions=True,
        )
    return max(_differ(*pair) for pair in zip(decoded.attentions, whole.attentions, strict=True))


def _position(vlm: Vlm, length: int) -> Tensor:
    """Position of the last token; PaliGemma counts from one, Qwen in three dimensions that skip inside images."""
    position = torch.tensor([[length - (vlm.model.config.model_type != "paligemma")]])
    skipped = getattr(vlm.model.model, "rope_deltas", None)
    return position if skipped is None else (position + skipped).expand(3, 1, 1)


def padding(folder: Path, side: str) -> float:
    """A sample says the same alone and in a padded batch; the adapter, too."""
    vlm = adapted(folder)
    inputs, masks = batch(vlm, side)
    with torch.no_grad():
        together = _run(vlm.model, inputs, routing=_routing(masks)).logits
        differences = []
        for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
            alone, own = split(encode(vlm, [noise(*SIZES[row], row)], [prompt], [answer]))
            expected = _run(vlm.model, alone, routing=_routing(own)).logits[0]
            differences.append(_differ(together[row][inputs["attention_mask"][row].bool()], expected, 2e-4))
    return max(differences)


def _routing(masks: dict[str, Tensor]) -> Routing:
    return Routing(masks["prompt_mask"], masks["image_mask"])


def a3moe(folder: Path) -> float:
    """Experts on every query and key projection of the language model and nowhere else; each of them learns, and is
    routed by the same tokens when the model has to find out which they are."""
    vlm = adapted(folder)
    decoder = vlm.model.get_base_model().get_decoder()
    layers = vlm.model.config.get_text_config().num_hidden_layers
    for kind in (RoutedQuery, RoutedKey):
        inside, anywhere = ([m for m in model.modules() if isinstance(m, kind)] for model in (decoder, vlm.model))
        assert len(inside) == len(anywhere) == layers
    trainable = {id(weight) for weight in decoder.parameters() if weight.requires_grad}
    assert trainable == {id(weight) for weight in vlm.model.parameters() if weight.requires_grad}
    inputs, masks = batch(vlm)
    _run(vlm.model, inputs, routing=_routing(masks)).loss.backward()
    learning = {name: p for name, p in vlm.model.named_parameters() if p.requires_grad}
    idle = [name for name, weight in learning.items() if weight.grad is None or not weight.grad.any()]
    assert not idle, idle
    asked, found = batch(vlm, "left", answers=None)
    with torch.no_grad():
        derived, given = _run(vlm.model, asked).logits, _run(vlm.model, asked, routing=_routing(found)).logits
    real = asked["attention_mask"].bool()
    return _differ(derived[real], given[real], 1e-6)


def accumulation(folder: Path) -> float:
    """The loss is the sum over the answers' tokens by the number given, so that accumulated batches weigh alike."""
    vlm = load_vlm(folder, device="cpu")
    inputs, _ = batch(vlm)
    own, given = int((inputs["labels"][:, 1:] != -100).sum()), 100
    with torch.no_grad():
        mean = _run(vlm.model, inputs).loss
        shared = _run(vlm.model, inputs, num_items_in_batch=torch.tensor(given)).loss
    return _differ(shared * given, mean * own, 1e-3)


def checkpointing(folder: Path) -> float:
    """Loss, captured attention and gradients are the same with activation checkpointing."""
    vlm = adapted(folder)
    vlm.model.train()
    inputs, masks = batch(vlm)
    request = capture_request("after_image", **masks)

    def step() -> tuple[Tensor, list[Tensor]]:
        vlm.model.zero_grad()
        out = _run(vlm.model, inputs, routing=_routing(masks), capture=request, output_attentions=True)
        loss = out.loss + sum((layer**2).sum() for layer in out.attentions)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in vlm.model.parameters() if p.grad is not None]

    loss, gradients = step()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        vlm.model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        again, anew = step()
    torch.testing.assert_close(again, loss)
    return max(_differ(a, b, 1e-5) for a, b in zip(anew, gradients, strict=True))


def generate(folder: Path) -> float:
    """Greedy answers of a batch with images of different sizes are those of its samples one by one."""
    vlm = adapted(folder)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=vlm.tokenizer.pad_token_id)

    def answers(inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return vlm.model.generate(**inputs, generation_config=greedy)[:, inputs["input_ids"].shape[1] :]

    together = answers(batch(vlm, "left", answers=None)[0])
    for row, prompt in enumerate(PROMPTS):
        alone = answers(split(encode(vlm, [noise(*SIZES[row], row)], [prompt]))[0])[0]
        assert torch.equal(together[row, : len(alone)], alone), (row, together[row], alone)
    return 0.0


def adapter_file(folder: Path) -> float:
    """A saved adapter gives the same model on a fresh base, and keeps what is no text."""
    vlm = adapted(folder)
    inputs, _ = batch(vlm, "left", answers=None)
    with TemporaryDirectory() as saved, torch.no_grad():
        vlm.model.save_pretrained(saved)
        again = load_adapter(load(folder).model, saved).eval()
        kept = again.active_peft_config
        assert (tuple(kept.control_ids), tuple(kept.layout_ids)) == (vlm.control_ids, vlm.layout_ids)
        return _differ(_run(again, inputs).logits, _run(vlm.model, inputs).logits, 1e-6)


def several_images(folder: Path) -> float:
    """Two images of different size in one prompt, each where its marker stands; captured columns follow."""
    vlm = load_vlm(folder, device="cpu")
    images = [noise(*size, seed) for seed, size in enumerate(SIZES[:2])]
    example = prepare(vlm, images, "<image> or <image> ?", "no")
    inputs, masks = split(encode(vlm, [images], ["<image> or <image> ?"], ["no"]))
    expected = sum(len(token_boxes(vlm, *size)) for size in SIZES[:2])
    assert len(example.boxes) == masks["image_mask"].sum() == expected
    request = capture_request("answer", **masks)
    with torch.no_grad():
        out = _run(vlm.model, inputs, capture=request, output_attentions=True)
    assert out.attentions[-1].shape[-1] == expected + 1
    return 0.0


CHECKS: dict[str, Callable[[Path], float]] = {
    "boxes": boxes,
    "geometry round trip": geometry,
    "token masks": masks_exact,
    "several images": several_images,
    "capture equal to eager, padded left": partial(capture_equals_eager, side="left"),
    "capture equal to eager, padded right": partial(capture_equals_eager, side="right"),
    "capture with a cache": capture_with_cache,
    "A3MoE": a3moe,
    "padding left": partial(padding, side="left"),
    "padding right": partial(padding, side="right"),
    "accumulation": accumulation,
    "checkpointing": checkpointing,
    "generate": generate,
    "adapter file": adapter_file,
}
