"""What A3Tune costs beside plain LoRA, and what the published way costs: one optimiser step at real widths.

    python benchmarks/step_cost.py [--quick] [--layers 4] [--batch 1 2 4] [--only SIDE ...] [--out FILE]

Random weights, decoder layers of Mistral-7B's shape, 576 image tokens and up to 100 of text, bfloat16. A step is
forward, backward and AdamW on the adapter, through `A3Trainer`. All sides share the frozen weights and take turns.
Peak memory comes from one more process per side and batch size. The vision tower is tiny, so that the decoder's cost
is what is compared: with a real tower every ratio is nearer to 1.

Sides: `peft` (LoRA in a plain `transformers.Trainer`), `lora` (the same in `A3Trainer`, without alignment), `aligned`
(with it), `a3tune` (and with A3MoE), `published` (`published.py`).
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from measure import about, listed, peak_memory, table, take_turns, write
from peft import LoraConfig, get_peft_model
from published import LoopedKey, LoopedQuery, Positions, alignment_loss
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Trainer,
    TrainingArguments,
)
from transformers.initialization import no_init_weights

from a3tune.adapters import add_adapter
from a3tune.adapters.model import language_linears
from a3tune.attention.capture import use_capture
from a3tune.config import AdapterConfig, AlignmentConfig
from a3tune.machine.threads import choose_threads
from a3tune.training.collate import Collator
from a3tune.training.trainer import A3Trainer
from a3tune.vlm.load import Vlm, _in_one_piece, describe

IMAGE_TOKEN, PATCH = 3, 14
BEFORE, PROMPT, ANSWER, SHORTER = 5, 63, 32, 8
"""Text tokens before the image and after it, and of the answer; each sample's answer is SHORTER than the last one's."""
SEGMENTS = 4
EXPERTS: dict[str, Any] = {
    "expert_rank": 16,
    "query_experts": 8,
    "key_experts": 16,
    "top_experts": 3,
    "router_hidden": 64,
}
"""The larger of the paper's two settings (Appendix C.1)."""
EXPERT_ALPHA, WEIGHT, SHARE = 8, 0.1, 0.125
LEARNING_RATE = 2e-4
INPUTS = ("input_ids", "attention_mask", "pixel_values", "labels", "logits_to_keep")
"""What of a batch the model takes."""
SIDES = ("peft", "lora", "aligned", "a3tune", "published")
Step = Callable[[], float]
"""One optimiser step; returns the loss before it."""


@dataclass(frozen=True)
class Shape:
    """Size of the language model."""

    layers: int = 4
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 32000
    grid: int = 24
    """Image tokens per side of the image."""
    rank: int = 64
    tower: tuple[int, int, int, int] = (2, 64, 128, 2)
    """Layers, width, inner width and heads of the vision tower."""

    @property
    def selected(self) -> int:
        """R of Eq. 9: one head in eight, as the paper's 128 of 1,024."""
        return max(1, round(SHARE * self.layers * self.heads))


QUICK = Shape(layers=2, hidden=64, inner=96, heads=4, kv_heads=2, vocab=256, grid=6, rank=4)


def base_model(shape: Shape, device: str = "cpu") -> LlavaForConditionalGeneration:
    """A LLaVA with random bfloat16 weights, made where it is used, whose tower yields `grid * grid` image tokens."""
    text = MistralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        sliding_window=None,
        tie_word_embeddings=False,
    )
    layers, width, inner, heads = shape.tower
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=PATCH * shape.grid,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, image_seq_length=shape.grid**2
    )
    torch.manual_seed(0)
    with torch.device(device), no_init_weights():
        model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    # The same numbers over and over: billions of new ones would take minutes.
    noise = torch.randn(2**24).mul_(0.02).to(device, torch.bfloat16)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.data.fill_(float("norm" in name and name.endswith("weight")))
        else:
            weight.data.copy_(noise.repeat(-(-weight.numel() // len(noise)))[: weight.numel()].view_as(weight))
    model.requires_grad_(False).get_output_embeddings().register_forward_pre_hook(_in_one_piece)
    return model


def positions(shape: Shape, size: int) -> Positions:
    """Where image, prompt and answers stand: `<s>`, text, image, text, answer."""
    image = slice(1 + BEFORE, 1 + BEFORE + shape.grid**2)
    end = image.stop + PROMPT - 1
    return Positions(image, end, [end + ANSWER - SHORTER * sample for sample in range(size)])


def make_batch(shape: Shape, size: int) -> dict[str, Any]:
    """What `Collator` makes of `size` samples."""
    where = positions(shape, size)
    noise = torch.Generator().manual_seed(1)
    place = torch.arange(max(where.lengths)).expand(size, -1)
    real = place < torch.tensor(where.lengths)[:, None]
    ids = torch.randint(4, shape.vocab, real.shape, generator=noise).where(real, 0)
    image_mask = torch.zeros_like(real)
    image_mask[:, where.image] = True
    answer_mask = real & (place >= where.prompt_end)
    ids[image_mask] = IMAGE_TOKEN
    keep = ANSWER + 1
    corner = torch.randint(0, shape.grid // 2, (size, SEGMENTS, 2), generator=noise)
    line = torch.arange(shape.grid)
    inside = [(line >= own[..., None]) & (line < own[..., None] + shape.grid // 3) for own in corner.unbind(-1)]
    return {
        "input_ids": ids,
        "attention_mask": real.long(),
        "pixel_values": torch.randn(size, 3, PATCH * shape.grid, PATCH * shape.grid, generator=noise),
        "image_mask": image_mask,
        "prompt_mask": real & ~image_mask & ~answer_mask & (place > 0),
        "answer_mask": answer_mask,
        "placed_mask": image_mask,
        "labels": ids.where(answer_mask, -100)[:, -keep:],
        "logits_to_keep": keep,
        "segments": (inside[0][..., None] & inside[1][..., None, :]).flatten(2).float(),
        "sample_ids": [str(sample) for sample in range(size)],
    }


def our_step(
    side: str, base: LlavaForConditionalGeneration, shape: Shape, size: int, *, checkpointing: bool = False
) -> Step:
    """One optimiser step of plain LoRA or of A3Tune; the adapter is its own, `base` is left alone."""
    model, batch = _twin(base), send_to_device(make_batch(shape, size), base.device)
    if side != "peft":
        use_capture(model)
    kind = "a3moe" if side == "a3tune" else "lora"
    adapted = add_adapter(model, AdapterConfig(kind, rank=shape.rank, expert_alpha=EXPERT_ALPHA, **EXPERTS))
    weight = 0.0 if side in ("peft", "lora") else WEIGHT
    args = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        use_cpu=base.device.type == "cpu",
        bf16=True,
        learning_rate=LEARNING_RATE,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    if side == "peft":
        trainer = Trainer(adapted, args)
        batch = {name: value for name, value in batch.items() if name in INPUTS} | {"use_cache": False}
    else:
        alignment = AlignmentConfig(weight=weight, heads=shape.selected)
        # Whose processor it is does not matter: it makes no batch here.
        vlm = Vlm(adapted, describe("tiny")[1], "made up")  # pyright: ignore[reportArgumentType]
        trainer = A3Trainer(adapted, args, [], Collator(vlm, lambda *_: None), alignment=alignment)
    if checkpointing:
        adapted.activation_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
    wrapped, optimiser = trainer.accelerator.prepare(adapted, trainer.create_optimizer())
    _fill(optimiser)

    def step() -> float:
        batches, items = trainer.get_batch_samples(iter([dict(batch)]), 1, base.device)
        loss = trainer.training_step(wrapped, batches[0], items)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def published_step(base: LlavaForConditionalGeneration, shape: Shape, size: int) -> Step:
    """One optimiser step of the published way, with LoRA on the matrices that have no experts."""
    model, where = _twin(base), positions(shape, size)
    batch: Any = send_to_device(make_batch(shape, size), base.device)
    model.set_attn_implementation({"text_config": "eager"})
    target = language_linears(model).replace("k_proj|", "").replace("q_proj|", "")
    adapted = get_peft_model(model, LoraConfig(r=shape.rank, lora_alpha=16, target_modules=target))
    settings = {"rank": EXPERTS["expert_rank"], "alpha": EXPERT_ALPHA, "router_hidden": EXPERTS["router_hidden"]}
    for layer in model.model.language_model.layers:
        attention: Any = layer.self_attn
        attention.q_proj = LoopedQuery(attention.q_proj, where, experts=EXPERTS["query_experts"], **settings)
        top = EXPERTS["top_experts"]
        attention.k_proj = LoopedKey(attention.k_proj, where, experts=EXPERTS["key_experts"], top=top, **settings)
    adapted.to(base.device).train()  # pyright: ignore[reportArgumentType]
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    _fill(optimiser)
    labels = batch["input_ids"].where(batch["answer_mask"], -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}

    def step() -> float:
        with torch.autocast(base.device.type, torch.bfloat16):
            outputs = adapted(**inputs, labels=labels, use_cache=False, output_attentions=True)
        align = alignment_loss(outputs.attentions, where, batch["segments"], shape.selected).mean()
        loss = outputs.loss + WEIGHT * align
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def make_step(side: str, base: LlavaForConditionalGeneration, shape: Shape, size: int) -> Step:
    return published_step(base, shape, size) if side == "published" else our_step(side, base, shape, size)


def lone_step(side: str, shape: Shape, size: int) -> Step:
    """A step with weights of its own, for `peak_memory`."""
    return make_step(side, base_model(shape), shape, size)


def _fill(optimiser: torch.optim.Optimizer) -> None:
    """Give the optimiser its state: every step that is measured is like the thousandth."""
    for group in optimiser.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimiser.step()
    optimiser.zero_grad()


def _twin(base: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """A model with the same weights, not copies of them, and everything else its own."""
    return copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})


def measure(
    base: LlavaForConditionalGeneration, shape: Shape, size: int, sides: Sequence[str], repetitions: int
) -> dict[str, dict[str, Any]]:
    """First losses and times of one batch size."""
    steps = {side: make_step(side, base, shape, size) for side in sides}
    losses = {side: step() for side, step in steps.items()}
    costs = take_turns(steps, repetitions, warmups=0)
    return {side: {"loss": losses[side], **costs[side]} for side in sides}


def markdown(record: Mapping[str, Any]) -> str:
    """One table: times, peak memory, and both over plain LoRA's."""
    header = [
        "Batch",
        "Side",
        "First loss",
        "CPU s",
        "x lora",
        "Wall s",
        "Peak GB",
        "x lora",
        "Above weights GB",
        "x lora",
    ]
    rows = []
    for size, sides in record["batches"].items():
        floor = sides.get("lora")
        for side, found in sides.items():
            above = found["peak"] - found["before"]
            times = ["-"] * 3
            if floor is not None:
                reference = (floor["cpu"].median, floor["peak"], floor["peak"] - floor["before"])
                times = [
                    f"{a / b:.3f}" for a, b in zip((found["cpu"].median, found["peak"], above), reference, strict=True)
                ]
            peak, own = f"{found['peak'] / 1e9:.2f}", f"{above / 1e9:.2f}"
            loss = f"{found['loss']:.4f}"
            rows.append([size, side, loss, found["cpu"], times[0], found["wall"], peak, times[1], own, times[2]])
    settings = {**record["about"], **record["shape"], **record["experts"]}
    lines = listed(settings)
    return "\n".join(["# Step cost", "", *lines, "", "Medians (least to most).", "", table(header, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny widths, seconds: to see that it works")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--only", nargs="+", choices=SIDES, default=SIDES, metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    arguments = parser.parse_args()
    choose_threads(1 if arguments.quick else None)
    shape = QUICK if arguments.quick else Shape(layers=arguments.layers)
    sizes, repetitions = ([2], 2) if arguments.quick else (arguments.batch, arguments.repetitions)
    # Memory first: no two processes may hold the weights at once.
    memory = {(size, side): peak_memory(lone_step, side, shape, size) for size in sizes for side in arguments.only}
    base = base_model(shape)
    batches: dict[int, Any] = {}
    for size in sizes:
        batches[size] = measure(base, shape, size, arguments.only, repetitions)
        for side, found in batches[size].items():
            found["before"], found["peak"] = memory[size, side]
        record = {"about": about(), "shape": asdict(shape), "experts": EXPERTS, "batches": batches}
        write(arguments.out, record, markdown(record))


if __name__ == "__main__":
    main()
