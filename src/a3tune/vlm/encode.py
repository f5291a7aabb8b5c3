"""Images, prompts and answers -> model inputs with exact token masks.

Knows chat templates and tokenizers; not what the masks are used for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL.Image import Image
from transformers import BatchFeature

from a3tune.errors import DataError, ModelError
from a3tune.vlm.load import Vlm

PaddingSide = Literal["left", "right"]
IMAGE = "<image>"
"""Places an image in a prompt; a prompt without it gets its images first, as the chat template puts them."""
TOKEN_MASKS = ("image_mask", "prompt_mask", "answer_mask")
"""Keys of a batch that are not inputs of the model."""


@dataclass(frozen=True)
class Example:
    """One sample as the model takes it, before padding."""

    input_ids: torch.Tensor
    """int64 `[S]`: the prompt, then the answer and its end token."""
    prompt_length: int
    """Where the answer starts."""
    images: dict[str, torch.Tensor]
    """What the processor made of the images (`pixel_values`, ...); the first axis counts images."""


def encode(
    vlm: Vlm,
    images: Sequence[Image] | Sequence[Sequence[Image]],
    prompts: Sequence[str],
    answers: Sequence[str] | None = None,
    *,
    padding_side: PaddingSide = "left",
) -> BatchFeature:
    """Model inputs of a batch, on the CPU (`.to(vlm.device)` moves them).

    Args:
        images: one image, or a list of images, per sample.
        prompts: questions; the model's chat template goes around them. "<image>" in a prompt places an image there.
        answers: what to learn; None to generate.
        padding_side: "left" to generate, "right" to train.

    Returns what `pad` returns. Raises what `prepare` raises.
    """
    per_sample = [[entry] if isinstance(entry, Image) else list(entry) for entry in images]
    targets = [None] * len(prompts) if answers is None else answers
    samples = zip(per_sample, prompts, targets, strict=True)
    return pad(vlm, [prepare(vlm, own, prompt, answer) for own, prompt, answer in samples], padding_side)


def prepare(vlm: Vlm, images: Sequence[Image], prompt: str, answer: str | None = None) -> Example:
    """Tokens and pixels of one sample. No token spans the border between prompt and answer.

    Raises `DataError` when a text holds a special token of the model, when "<image>" stands in the prompt more or less
    often than there are images, and when the text is longer than the model's context.
    """
    _refuse_special_tokens(vlm, prompt.replace(IMAGE, ""), "prompt")
    asked = _render_prompt(vlm, prompt, len(images))
    bos = vlm.tokenizer.bos_token
    add_special = not (bos and asked.startswith(bos))
    inputs = vlm.processor(
        text=[asked], images=list(images) or None, add_special_tokens=add_special, return_tensors="pt"
    )
    prompt_ids = inputs.pop("input_ids")[0]
    inputs.pop("attention_mask")
    answer_ids = [] if answer is None else _answer_ids(vlm, asked, answer, add_special)
    input_ids = torch.cat([prompt_ids, torch.tensor(answer_ids, dtype=torch.long)])
    limit = vlm.model.config.text_config.max_position_embeddings
    if len(input_ids) > limit:
        raise DataError(
            f"prompt {prompt[:40]!r}: with its images and answer it takes {len(input_ids)} tokens; the model takes "
            f"{limit}. Shorten it."
        )
    return Example(input_ids, prompt_length=len(prompt_ids), images=dict(inputs))


def pad(vlm: Vlm, examples: Sequence[Example], padding_side: PaddingSide) -> BatchFeature:
    """Batch of examples of different lengths.

    Returns int64 `input_ids` and `attention_mask` `[B, S]`; float32 `pixel_values` and whatever else the images became;
    and the bool masks `[B, S]` `image_mask`, `prompt_mask` (the prompt's text, template included) and `answer_mask`
    (answer and end token). With answers also int64 `labels` `[B, S]`: the token where `answer_mask`, else -100. The
    masks (`TOKEN_MASKS`) are not for the model.
    """
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    prompt_lengths = torch.tensor([example.prompt_length for example in examples])
    longest = int(lengths.max())
    position = torch.arange(longest).expand(len(examples), -1)
    if padding_side == "left":
        position = position - (longest - lengths)[:, None]
    real = (position >= 0) & (position < lengths[:, None])
    input_ids = torch.full(real.shape, vlm.tokenizer.pad_token_id)
    input_ids[real] = torch.cat([example.input_ids for example in examples])
    answer_mask = real & (position >= prompt_lengths[:, None])
    image_mask = real & (input_ids == vlm.model.config.image_token_id)
    batch = {
        "input_ids": input_ids,
        "attention_mask": real.long(),
        "image_mask": image_mask,
        "prompt_mask": real & ~image_mask & ~answer_mask,
        "answer_mask": answer_mask,
    }
    if answer_mask.any():
        batch["labels"] = input_ids.where(answer_mask, -100)
    keys = dict.fromkeys(key for example in examples for key in example.images)
    batch |= {key: torch.cat([example.images[key] for example in examples if example.images]) for key in keys}
    return BatchFeature(batch)


def _render_prompt(vlm: Vlm, prompt: str, images: int) -> str:
    """The user's turn in the chat template, up to where the answer begins."""
    placed = prompt.count(IMAGE)
    if placed not in (0, images):
        raise DataError(
            f"prompt {prompt[:40]!r}: {IMAGE} stands in it {placed} times, but the sample has {images} image(s). "
            f"Write {IMAGE} once per image, or leave it out: the images then come first."
        )
    # Templates may move image parts to the front; a placeholder in the text stays where it is.
    text = prompt.replace(IMAGE, vlm.processor.image_token)
    content = [{"type": "image"}] * (images - placed) + [{"type": "text", "text": text}]
    return _render(vlm, [{"role": "user", "content": content}], add_generation_prompt=True)


def _answer_ids(vlm: Vlm, asked: str, answer: str, add_special: bool) -> list[int]:
    """Answer and end token, tokenised as they stand after the prompt."""
    _refuse_special_tokens(vlm, answer, "answer")
    turn = [
        {"role": "user", "content": [{"type": "text", "text": ""}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    empty, filled = _render(vlm, turn[:1], add_generation_prompt=True), _render(vlm, turn)
    if not filled.startswith(empty):
        raise ModelError(f"{vlm.name}: its chat template writes answers in another place than its generation prompt.")
    tokenizer = vlm.tokenizer
    text = filled.removeprefix(empty).split(tokenizer.eos_token)[0].rstrip()
    before = tokenizer(asked, add_special_tokens=add_special)["input_ids"]
    whole = tokenizer(asked + text, add_special_tokens=add_special)["input_ids"]
    if whole[: len(before)] != before:  # a token would span the border
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return [*whole[len(before) :], tokenizer.eos_token_id]


def _render(vlm: Vlm, messages: list[dict], *, add_generation_prompt: bool = False) -> str:
    if vlm.processor.chat_template is None:
        raise ModelError(
            f"{vlm.name}: the processor has no chat template. Put a chat_template.jinja into the model's folder."
        )
    return vlm.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def _refuse_special_tokens(vlm: Vlm, text: str, what: str) -> None:
    """A control token inside a user's text would end the turn, or stand for an image that is not there."""
    for token in vlm.tokenizer.added_tokens_decoder.values():
        if token.special and token.content in text:
            raise DataError(
                f"{what} {text[:40]!r}: {token.content!r} is a control token of the model; take it out of the text."
            )
