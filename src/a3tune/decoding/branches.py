"""Negative branches: the same prompt with a noisy image, with a part of its tokens, or without it.

Knows model inputs; not what a branch is used for.
"""

import copy
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from a3tune.compat.generation import ENCODED, encoded_images
from a3tune.decoding.base import Inputs
from a3tune.vlm.encode import prepare
from a3tune.vlm.load import Vlm

DIFFUSION_STEPS = 1000


def noisy(inputs: Inputs, step: int, seed: int) -> Inputs:
    """The images after `step` (0 to 999) steps of the diffusion of VCD.

    Every image draws from a generator of its own, seeded alike: no sample's noise depends on its batch.
    """
    if "pixel_values" not in inputs:
        return inputs
    pixels: Tensor = inputs["pixel_values"]
    beta = torch.linspace(-6, 6, DIFFUSION_STEPS, dtype=torch.float64).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    kept = float((1 - beta).cumprod(0)[step])
    # Qwen's pixels are patches in a row, as many per image as its grid says.
    images = pixels.split(inputs["image_grid_thw"].prod(-1).tolist() if pixels.ndim == 2 else 1)
    noise = torch.cat([_noise(image, seed) for image in images])
    mixed = kept**0.5 * pixels + (1 - kept) ** 0.5 * noise.to(pixels)
    if pixels.ndim > 3:
        # Idefics3 knows the tiles that only fill a batch by their being zero.
        mixed = mixed.where(pixels.ne(0).flatten(-3).any(-1)[..., None, None, None], pixels)
    return inputs | {"pixel_values": mixed}


def _noise(image: Tensor, seed: int) -> Tensor:
    """Standard normal, drawn tile by tile: the same for a tile, however many of them fill up the batch."""
    generator = torch.Generator().manual_seed(seed)
    tiles = image.flatten(0, -4) if image.ndim > 3 else image[None]
    return torch.stack([torch.randn(tile.shape, generator=generator) for tile in tiles]).view(image.shape)


def encode_images(vlm: Vlm, inputs: Inputs) -> Inputs:
    """The same with the images' features (`ENCODED`) in the place of their pixels, so that branches can share them."""
    if "pixel_values" not in inputs:
        return inputs
    encoded = encoded_images(vlm.model, inputs)
    return {name: value for name, value in inputs.items() if name != "pixel_values"} | {ENCODED: encoded}


def image_columns(vlm: Vlm, inputs: Inputs) -> Tensor:
    """Positions of the image tokens, int64 `[B, N]` in feature order, -1 where padded."""
    rows = [mask_S.nonzero().flatten() for mask_S in image_mask(vlm, inputs)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def image_mask(vlm: Vlm, inputs: Inputs) -> Tensor:
    """Image tokens, bool `[B, S]`; its True values in reading order are the features in their order."""
    return inputs["input_ids"] == vlm.model.config.image_token_id


def zero_features(inputs: Inputs, keep: Tensor) -> Inputs:
    """Features of the other image tokens become zero. `keep` is bool, one per image token of the whole batch."""
    return inputs | {ENCODED: {"image": _edited(inputs, lambda features: _multiply(features, keep))}}


def keep_features(vlm: Vlm, inputs: Inputs, chosen_IK: Tensor) -> Inputs:
    """Each image keeps these of its features, in this order; as many of its tokens stay in the prompt.

    `chosen_IK` is int64, one row per image of the batch; for models that give one token per patch, image by image.
    """
    image_BS = image_mask(vlm, inputs)
    tokens = int(image_BS.sum()) // len(chosen_IK)
    keep_BS = ~image_BS
    keep_BS[image_BS] = (torch.arange(tokens) < chosen_IK.shape[1]).repeat(len(chosen_IK)).to(keep_BS.device)

    def chosen(features: Any) -> Any:
        return [part[rows_K.to(part.device)] for part, rows_K in zip(features, chosen_IK, strict=True)]

    return _keep_tokens(vlm, inputs, keep_BS) | {ENCODED: {"image": _edited(inputs, chosen)}}


def without_images(vlm: Vlm, inputs: Inputs) -> Inputs:
    """The same prompts without images: their tokens are gone, and the markup around them.

    Markup is every control token that the template does not write without an image, and blanks between two of them.
    """
    markup = torch.tensor(_markup(vlm), device=inputs["input_ids"].device)
    keep_BS = ~torch.isin(inputs["input_ids"], markup)
    for keep_S, ids_S in zip(keep_BS, inputs["input_ids"], strict=True):
        _drop_blanks(vlm, keep_S, ids_S)
    return _keep_tokens(vlm, inputs, keep_BS)


def _markup(vlm: Vlm) -> Sequence[int]:
    image = vlm.model.config.image_token_id
    if not vlm.family.chat:
        return [image]
    tokenizer = vlm.tokenizer
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return sorted({image, *vlm.control_ids} - {*prepare(vlm, [], "X").input_ids.tolist(), *ends})


def _drop_blanks(vlm: Vlm, keep_S: Tensor, ids_S: Tensor) -> None:
    """In place: of a prompt's runs of kept tokens, those between markup that say nothing (line ends between tiles)."""
    place = 0
    runs = []
    for kept, group in groupby(keep_S.tolist()):
        length = len(list(group))
        runs.append((kept, place, place + length))
        place += length
    for kept, start, end in runs[1:-1]:
        if kept and not vlm.tokenizer.decode(ids_S[start:end]).strip():
            keep_S[start:end] = False


def _keep_tokens(vlm: Vlm, inputs: Inputs, keep_BS: Tensor) -> Inputs:
    """Prompts of the kept tokens, padded on the left again, without images; token types go with their tokens."""
    keep_BS = keep_BS & inputs["attention_mask"].bool()
    length = int(keep_BS.sum(1).max())
    # Stable: the dropped tokens go to the front, all others keep their order.
    order = keep_BS.byte().argsort(dim=1, stable=True)[:, -length:]
    mask = keep_BS.gather(1, order)
    fill = {"input_ids": vlm.tokenizer.pad_token_id}
    return {
        name: value.gather(1, order).masked_fill(~mask, fill.get(name, 0))
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.shape == keep_BS.shape
    }


def _edited(inputs: Inputs, edit: Any) -> Any:
    """A copy of the images' features with `edit` done to them, also to those that enter at later layers (Qwen3-VL)."""
    encoded = copy.copy(inputs[ENCODED]["image"])
    encoded.pooler_output = edit(encoded.pooler_output)
    if getattr(encoded, "deepstack_features", None) is not None:
        encoded.deepstack_features = [edit(layer) for layer in encoded.deepstack_features]
    return encoded


def _multiply(features: Any, keep: Tensor) -> Any:
    """`features` are one tensor `[..., D]` or one per image, their rows the image tokens in order."""
    if isinstance(features, Tensor):
        return features * keep.to(features).view(*features.shape[:-1], 1)
    parts = keep.split([part.shape[:-1].numel() for part in features])
    return [_multiply(part, kept) for part, kept in zip(features, parts, strict=True)]
