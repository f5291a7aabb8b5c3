"""What the tests of decoding share: batches and their samples alone, and a slow decoder without a cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from a3tune.adapters import Routing
from a3tune.attention.capture import use_capture
from a3tune.data.phantom.questions import TEMPLATES
from a3tune.decoding.beams import Beams
from a3tune.decoding.opera import _Retrospection
from a3tune.vlm.encode import TOKEN_MASKS, Example, encode, end_token_id, pad, prepare
from a3tune.vlm.load import Vlm
from a3tune.vlm.tiny import random_vlm, tiny_processor, train_tokenizer
from zoo import ZOO
from zoo.checks import SIZES, adapted, load, noise

PROMPTS = ("Where is the lesion?", "What?", "What is shown in the liver of this patient?")
NEW = 6
"""Tokens of every answer, unless an end token comes first."""


class Models:
    """Models of the zoo, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Vlm] = {}

    def __call__(self, name: str) -> Vlm:
        """`name` is one of the zoo; with "+adapter" at its end the model carries an adapter that routes."""
        if name not in self.made:
            family = name.removesuffix("+adapter")
            path = self.folder / family
            if not path.exists():
                ZOO[family](path)
            self.made[name] = _peaked(load(path) if name == family else adapted(path))
        return self.made[name]


def _peaked(vlm: Vlm) -> Vlm:
    """Random weights say nearly the same whatever they see, and nothing clearly: louder attention, louder logits."""
    with torch.no_grad():
        for name, weight in vlm.model.get_decoder().named_parameters():
            if any(part in name for part in ("v_proj", "o_proj")) and ".lora_" not in name:
                weight.mul_(5)
    head: Any = vlm.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: 20 * output)
    return vlm


def deep_vlm(layers: int, hidden: int) -> Vlm:
    """A random LLaVA with grouped-query attention. Random weights look everywhere alike and say nothing clearly: peaked
    attention, loud values, and a head so loud that layers disagree."""
    model = random_vlm(hidden=hidden, layers=layers, heads=4, kv_heads=2)
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if "proj" in name:
                weight.mul_(6)
        model.lm_head.weight.mul_(20)
    use_capture(model)
    texts = [text for templates in TEMPLATES.values() for text in templates]
    return Vlm(model, tiny_processor(train_tokenizer(texts)), "deep")


@contextmanager
def counted_returns() -> Iterator[list[int]]:
    """How often OPERA went back in each of the samples searched while this is open, in their order."""
    counts: list[int] = []
    check = _Retrospection.check

    def counted(self: _Retrospection, beams: Beams, place_BC: Tensor) -> tuple[Beams, Tensor] | None:
        if not self.states:
            counts.append(0)
        back = check(self, beams, place_BC)
        counts[-1] += back is not None
        return back

    with patch.object(_Retrospection, "check", counted):
        yield counts


def image(row: int) -> Any:
    return noise(*SIZES[row], row)


def batch(vlm: Vlm, rows: Sequence[int] = range(len(PROMPTS))) -> dict[str, Any]:
    """Inputs of some prompts, each with an image of a size of its own, padded on the left."""
    encoded = encode(vlm, [image(row) for row in rows], [PROMPTS[row] for row in rows], padding_side="left")
    return {name: value for name, value in encoded.items() if name not in TOKEN_MASKS}


def logits(vlm: Vlm, example: Example) -> Tensor:
    """Of the next token after everything in `example`, fp32 `[1, V]`: one whole pass, no cache, nothing padded."""
    inputs = dict(pad(vlm, [example], "right"))
    masks = {name: inputs.pop(name) for name in TOKEN_MASKS}
    inputs.pop("labels", None)
    routing = Routing(masks["prompt_mask"], masks["image_mask"] if masks["image_mask"].any() else None)
    forward = {"routing": routing} if hasattr(vlm.model, "peft_config") else {}
    with torch.no_grad():
        return vlm.model(**inputs, **forward, use_cache=False).logits[:, -1].float()


def grown(example: Example, token: int) -> Example:
    return replace(example, input_ids=torch.cat([example.input_ids, torch.tensor([token])]))


def slow_greedy(
    vlm: Vlm,
    positive: Example,
    negative: Example,
    scores: Callable[[Tensor, Tensor, int], Tensor],
    read: Callable[[Example], Tensor] | None = None,
) -> list[int]:
    """Greedy contrastive decoding as in a textbook: both branches `read` (as `logits` does) everything at each step."""
    read = read or partial(logits, vlm)
    own: Any = vlm.model.generation_config.eos_token_id
    ends = {vlm.tokenizer.eos_token_id, end_token_id(vlm), *([own] if isinstance(own, int) else own or [])}
    answer: list[int] = []
    while len(answer) < NEW and not (answer and answer[-1] in ends):
        answer.append(int(scores(read(positive), read(negative), len(answer) + 1).argmax()))
        positive, negative = grown(positive, answer[-1]), grown(negative, answer[-1])
    return answer


def example(vlm: Vlm, row: int) -> Example:
    return prepare(vlm, [image(row)], PROMPTS[row])


def imageless(vlm: Vlm, of: Example, *border: str) -> Example:
    """The same prompt without the image's token and the tokens of its border."""
    gone = [vlm.model.config.image_token_id, *(vlm.tokenizer.convert_tokens_to_ids(token) for token in border)]
    kept = ~torch.isin(of.input_ids, torch.tensor(gone))
    return replace(
        of,
        input_ids=of.input_ids[kept],
        prompt_length=int(kept.sum()),
        images={},
        boxes=of.boxes[:0],
        token_types={name: value[kept] for name, value in of.token_types.items()},
    )
