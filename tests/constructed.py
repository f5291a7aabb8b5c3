"""A model whose reliance is known: set by hand to say "yes" if one patch is bright, and else "no"."""

from typing import Any

import torch

from a3tune.attention.capture import use_capture
from a3tune.vlm.load import Vlm
from a3tune.vlm.tiny import PATCH_SIZE, random_vlm, tiny_processor, train_tokenizer

PROMPT = "Is it bright?"
SIDE = 48
"""Of its images, in pixels: 4 x 4 patches."""
BRIGHT = 228
"""Grey value of the patch from which on the answer is yes, about."""
_GREY, _HERE, _ONE, _OUT, _SAID = range(5)
"""Dimensions of the residual stream: the patch's grey value, whether it is the one, a constant, the read-out, and
whether the token is an answer."""


def reader(patch: int) -> Vlm:
    """Its first head looks at `patch` alone, from everywhere, and the answer is what that head reads."""
    tokenizer: Any = train_tokenizer([PROMPT, *[" yes", " no"] * 50], vocab=300)
    yes, no = (tokenizer.convert_tokens_to_ids(f"Ġ{word}") for word in ("yes", "no"))
    model = random_vlm(hidden=32, layers=1, heads=4, kv_heads=4, vocab=300, image_size=SIDE)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(float("norm" in name and name.endswith("weight")))
        _see(model, patch)
        _read(model, yes, no, tokenizer.eos_token_id)
    use_capture(model)
    return Vlm(model, tiny_processor(tokenizer, SIDE), "reader")


def _see(model: Any, patch: int) -> None:
    """Image tokens hold their patch's grey value (in the processor's units, about -1.8 to 2) and the mark."""
    embeddings = model.model.vision_tower.embeddings
    positions = embeddings.position_embedding.weight
    each = 1 / (3 * PATCH_SIZE**2)
    embeddings.patch_embedding.weight[0], embeddings.patch_embedding.weight[1] = each, -each
    positions[patch + 1, 2], positions[patch + 1, 3] = 1, -1
    # Of all patches alike and by far the largest: the layer norm then divides them by the same.
    positions[:, 4], positions[:, 5] = 100, -100
    scale = (2 * 100**2 / 32) ** 0.5
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    for row, column in ((0, 0), (2, 2)):
        # gelu(x) - gelu(-x) = x
        first.weight[row, column], first.weight[row + 1, column] = scale, -scale
    for row, column in ((_GREY, 0), (_HERE, 2)):
        second.weight[row, column], second.weight[row, column + 1] = 1, -1
    second.bias[_ONE] = 10


def _read(model: Any, yes: int, no: int, end: int) -> None:
    decoder = model.model.language_model
    decoder.embed_tokens.weight[:, _ONE] = 10
    decoder.embed_tokens.weight[[yes, no], _SAID] = 50
    head = decoder.layers[0].self_attn
    # The pair of dimensions that rotates least with the position.
    head.q_proj.weight[3, _ONE], head.k_proj.weight[3, _HERE] = 1, 20
    head.v_proj.weight[0, _GREY] = 1
    head.o_proj.weight[_OUT, 0] = 10
    grey = (BRIGHT / 255 - 0.46) / 0.27
    read = torch.zeros(32)
    read[_OUT], read[_ONE] = 1, -grey * 32**0.5 / 10
    model.lm_head.weight[yes], model.lm_head.weight[no] = 20 * read, -20 * read
    model.lm_head.weight[end, _SAID] = 100
    # Whatever else could be said is less likely than both.
    model.lm_head.weight[:, _ONE] -= 50
    model.lm_head.weight[[yes, no, end], _ONE] += 50
