"""Images, prompts and answers -> model inputs with exact token masks.

Knows chat templates and tokenizers; not what the masks are used for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL.Image import Image
from transformers import BatchFeature

from a3tune.adapters.routing import is_markup
from a3tune.errors import DataError, ModelError, in_short
from a3tune.machine.quiet import ignoring
from a3tune.vlm.grids import token_boxes
from a3tune.vlm.load import Vlm

PaddingSide = Literal["left", "right"]
IMAGE = "<image>"
"""Places an image in a prompt; a prompt without it gets its images first, as the chat template puts them."""
TOKEN_MASKS = ("image_mask", "prompt_mask", "answer_mask", "placed_mask")
"""Keys of a batch that are not inputs of the model."""


@dataclass(frozen=True)
class Example:
    """One sample as the model takes it, before padding."""

    input_ids: torch.Tensor
    """int64 `[S]`: the prompt, then the answer and its end token."""
    prompt_length: int
    """Where the answer starts."""
    images: dict[str, torch.Tensor]
    """What the processor made of the images (`pixel_values`, ...); the first axis counts images, tiles or patches."""
    boxes: np.ndarray
    """float64 `[N, 4]`: where each image token looks, in its own image (`grids.token_boxes`)."""
    token_types: dict[str, torch.Tensor] = field(default_factory=dict)
    """int64 `[prompt_length]`: what the processor says of each token of the prompt (`token_type_ids`, ...)."""


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
    return pad(vlm, [prepare(vlm, images, prompt, answer) for images, prompt, answer in samples], padding_side)


def prepare(vlm: Vlm, images: Sequence[Image], prompt: str, answer: str | None = None) -> Example:
    """Tokens and pixels of one sample. No token spans the border between prompt and answer.

    Raises `DataError` when a text holds a special token of the model, when "<image>" stands in the prompt more or less
    often than there are images, when the processor refuses an image (Qwen: 200 times longer than wide), and when the
    text is longer than the model's context.
    """
    _refuse_special_tokens(vlm, prompt.replace(IMAGE, ""), "prompt")
    asked = _render_prompt(vlm, prompt, len(images))
    bos = vlm.tokenizer.bos_token
    add_special = not (bos and asked.startswith(bos))
    inputs = _process(vlm, asked, images, add_special)
    prompt_ids = inputs.pop("input_ids")
    del inputs["attention_mask"]
    inputs.pop("labels", None)  # PaliGemma's processor makes some, of a prompt
    token_types = {name: value[0] for name, value in inputs.items() if value.shape == prompt_ids.shape}
    answer_ids = [] if answer is None else _answer_ids(vlm, asked, answer, add_special)
    input_ids = torch.cat([prompt_ids[0], torch.tensor(answer_ids, dtype=torch.long)])
    limit = vlm.model.config.text_config.max_position_embeddings
    if len(input_ids) > limit:
        raise DataError(
            f"prompt {prompt[:40]!r}: with its images and answer it takes {len(input_ids)} tokens; the model takes "
            f"{limit}. Shorten it."
        )
    return Example(
        input_ids,
        prompt_length=prompt_ids.shape[1],
        images={name: value for name, value in inputs.items() if name not in token_types},
        boxes=_boxes(vlm, images, input_ids),
        token_types=token_types,
    )


def pad(vlm: Vlm, examples: Sequence[Example], padding_side: PaddingSide) -> BatchFeature:
    """Batch of examples of different lengths.

    Returns int64 `input_ids` and `attention_mask` `[B, S]`; float32 `pixel_values` and whatever else the images became;
    and the bool masks `[B, S]` `image_mask`, `prompt_mask` (the prompt's text, template included but no control tokens,
    nor what lays out an image), `answer_mask` (answer and end token) and `placed_mask` (the image tokens that have a
    box). With answers also int64 `labels` `[B, S]`: the token where `answer_mask`, else -100. The masks (`TOKEN_MASKS`)
    are not for the model.
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
    markup = is_markup(input_ids, image_mask, vlm.control_ids, vlm.layout_ids)
    placed_mask = image_mask.clone()
    placed_mask[image_mask] = torch.from_numpy(np.concatenate([~np.isnan(example.boxes[:, 0]) for example in examples]))
    batch = {
        "input_ids": input_ids,
        "attention_mask": real.long(),
        "image_mask": image_mask,
        "prompt_mask": real & ~image_mask & ~answer_mask & ~markup,
        "answer_mask": answer_mask,
        "placed_mask": placed_mask,
    }
    if answer_mask.any():
        batch["labels"] = input_ids.where(answer_mask, -100)
    for name in dict.fromkeys(name for example in examples for name in example.token_types):
        batch[name] = torch.zeros_like(input_ids).masked_fill(answer_mask, vlm.family.answer_type)
        batch[name][real & ~answer_mask] = torch.cat([example.token_types[name] for example in examples])
    for name in dict.fromkeys(name for example in examples for name in example.images):
        batch[name] = _join([example.images[name] for example in examples if name in example.images])
    return BatchFeature(batch)


def _process(vlm: Vlm, asked: str, images: Sequence[Image], add_special: bool) -> dict[str, torch.Tensor]:
    """What the processor makes of the rendered prompt and its images; `DataError` for images that it refuses."""
    try:
        # PaliGemma's processor makes arrays of tensors in a way that numpy 2 warns of.
        with ignoring("__array__ implementation", DeprecationWarning):
            return dict(
                vlm.processor(
                    text=[asked], images=list(images) or None, add_special_tokens=add_special, return_tensors="pt"
                )
            )
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, MemoryError) as error:
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        why = in_short(error) or type(error).__name__
        raise DataError(f"images of {sizes} pixels: the model's processor refuses them: {why}") from error


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate along the first axis; where images have different numbers of tiles (second axis), fill with zeros."""
    if parts[0].ndim > 1:
        most = max(part.shape[1] for part in parts)
        missing = [part.new_zeros(len(part), most - part.shape[1], *part.shape[2:]) for part in parts]
        parts = [torch.cat(pair, dim=1) for pair in zip(parts, missing, strict=True)]
    return torch.cat(parts)


def _boxes(vlm: Vlm, images: Sequence[Image], input_ids: torch.Tensor) -> np.ndarray:
    """Boxes of all image tokens of a sample, image by image."""
    boxes = np.concatenate([np.zeros((0, 4)), *(token_boxes(vlm, image.height, image.width) for image in images)])
    tokens = int((input_ids == vlm.model.config.image_token_id).sum())
    if tokens != len(boxes):
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        raise ModelError(
            f"{vlm.name}: its processor makes {tokens} image tokens of {sizes} pixels, its configuration {len(boxes)}. "
            "Make processor_config.json and config.json of the model agree on image, patch and tile sizes."
        )
    return boxes


def _render_prompt(vlm: Vlm, prompt: str, images: int) -> str:
    """The user's turn in the chat template, up to where the answer begins."""
    placed = prompt.count(IMAGE)
    if placed not in (0, images):
        raise DataError(
            f"prompt {prompt[:40]!r}: {IMAGE} stands in it {placed} times, but the sample has {images} image(s). "
            f"Write {IMAGE} once per image, or leave it out: the images then come first."
        )
    if not vlm.family.chat:
        return _render_plain(vlm, prompt, images, placed)
    # Templates may move image parts to the front; what they write for one stays where it is in the text.
    text = prompt.replace(IMAGE, _image_markup(vlm)) if placed else prompt
    content = [{"type": "image"}] * (images - placed) + [{"type": "text", "text": text}]
    return _render(vlm, [{"role": "user", "content": content}], add_generation_prompt=True)


def _render_plain(vlm: Vlm, prompt: str, images: int, placed: int) -> str:
    """Images and prompt for a processor that writes the rest (bos, line end) itself."""
    if not images:
        raise DataError(f"prompt {prompt[:40]!r}: {vlm.model.config.model_type} takes no prompt without an image.")
    image = vlm.processor.image_token
    return image * (images - placed) + prompt.replace(IMAGE, image)


def _image_markup(vlm: Vlm) -> str:
    """What the chat template writes for an image: its token, with the tokens of its borders where it has such."""
    text = {"type": "text", "text": "X"}
    one, two = (_render(vlm, [{"role": "user", "content": [{"type": "image"}] * n + [text]}]) for n in (1, 2))
    start = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    return two[start : start + len(two) - len(one)].strip()


def _answer_ids(vlm: Vlm, asked: str, answer: str, add_special: bool) -> list[int]:
    """Answer and end token, tokenised as they stand after the prompt."""
    _refuse_special_tokens(vlm, answer, "answer")
    tokenizer = vlm.tokenizer
    if not vlm.family.chat:
        return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    text, end = _render_answer(vlm, answer)
    before = tokenizer(asked, add_special_tokens=add_special)["input_ids"]
    whole = tokenizer(asked + text, add_special_tokens=add_special)["input_ids"]
    if whole[: len(before)] != before:  # a token would span the border
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
    return [*whole[len(before) :], end]


def end_token_id(vlm: Vlm) -> int:
    """Id of the token that ends an answer, as `prepare` writes it: that of the chat template, else the tokenizer's."""
    return _render_answer(vlm, "X")[1] if vlm.family.chat else vlm.tokenizer.eos_token_id


def _render_answer(vlm: Vlm, answer: str) -> tuple[str, int]:
    """What the chat template writes after its generation prompt, up to the token that ends the turn, and its id."""
    turn = [
        {"role": "user", "content": [{"type": "text", "text": ""}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    empty, filled = _render(vlm, turn[:1], add_generation_prompt=True), _render(vlm, turn)
    text = filled.removeprefix(empty)
    if not filled.startswith(empty):
        # LLaVA-OneVision's puts a blank before the answer's line that its generation prompt does not have.
        for word in empty.split():
            if not text.lstrip().startswith(word):
                raise ModelError(
                    f"{vlm.name}: its chat template writes answers in another place than its generation prompt."
                )
            text = text.lstrip().removeprefix(word)
        text = text.lstrip()
    tokens = vlm.tokenizer.added_tokens_decoder
    ends = {text.find(tokens[index].content): index for index in vlm.control_ids if tokens[index].content in text}
    if not ends:
        return text.rstrip(), vlm.tokenizer.eos_token_id
    return text[: min(ends)].rstrip(), ends[min(ends)]


def _render(vlm: Vlm, messages: list[dict], *, add_generation_prompt: bool = False) -> str:
    if vlm.processor.chat_template is None:
        raise ModelError(
            f"{vlm.name}: the processor has no chat template. Put a chat_template.jinja into the model's folder."
        )
    try:
        return vlm.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a small program, and raises what it likes
        raise ModelError(
            f"{vlm.name}: its chat template fails ({in_short(error)}); get the complete, original checkpoint"
        ) from error


def _refuse_special_tokens(vlm: Vlm, text: str, what: str) -> None:
    """A control token inside a user's text would end the turn, or stand for an image that is not there."""
    for token in vlm.tokenizer.added_tokens_decoder.values():
        if token.special and token.content in text:
            raise DataError(
                f"{what} {text[:40]!r}: {token.content!r} is a control token of the model; take it out of the text."
            )
