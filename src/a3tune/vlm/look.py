"""One teacher-forced pass over questions and their answers, and what stands before and after it.

The only place that runs a model for its attention: training, calibration, evaluation and the explorer all look here.
Knows inputs, token masks and the forward keywords of capture and routing; not what is made of what was seen.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from a3tune.adapters.routing import Routing
from a3tune.attention.capture import CaptureRequest
from a3tune.vlm.encode import TOKEN_MASKS, Example, PaddingSide, pad
from a3tune.vlm.load import Vlm


def model_inputs(
    vlm: Vlm, examples: Sequence[Example], padding_side: PaddingSide
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the model takes, on its device and in its dtype, and the token masks (`TOKEN_MASKS`)."""
    batch = pad(vlm, examples, padding_side).to(vlm.device, dtype=vlm.model.dtype)
    masks = {name: batch.pop(name) for name in TOKEN_MASKS}
    batch.pop("labels", None)
    return dict(batch), masks


def look(
    model: Callable[..., Any],
    inputs: Mapping[str, Any],
    masks: Mapping[str, Tensor],
    request: CaptureRequest | None = None,
    *,
    routed: bool = True,
    **keywords: Any,
) -> Any:
    """The outputs of one pass over whole sequences, answers included, without a cache.

    Args:
        model: the VLM, with or without an adapter, wrapped for several devices or not.
        inputs: what it takes, and `masks` (`TOKEN_MASKS`), as `model_inputs` returns them.
        request: which attention to bring out, for `attention.capture.stack(outputs.attentions, request)`; None: none.
        routed: tell the adapter which tokens are prompt and which are image; a model without experts needs it not.
        keywords: more of them for the model, such as `logits_to_keep=1` where only the attention is wanted.
    """
    if request is not None:
        keywords |= {"capture": request, "output_attentions": True}
    if routed:
        keywords["routing"] = Routing(masks["prompt_mask"], masks["image_mask"])
    return model(**inputs, use_cache=False, **keywords)


def answer_text(vlm: Vlm, tokens: Tensor) -> str:
    """What the tokens of an answer say, int64 `[S_new]`: without control tokens, up to a text that ends answers."""
    text = vlm.tokenizer.decode(tokens, skip_special_tokens=True)
    for stop in vlm.model.generation_config.stop_strings or ():
        text = text.split(stop)[0]
    return text.strip()


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text; nothing for control tokens and for the first bytes of a character."""
    texts = [tokenizer.decode(ids[:end], skip_special_tokens=True).rstrip("\ufffd") for end in range(len(ids) + 1)]
    return tuple(after[len(before) :] for before, after in pairwise(texts))
