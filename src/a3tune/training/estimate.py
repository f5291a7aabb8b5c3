"""What a training will take, before it starts: optimiser steps, and the memory of one device.

Weights and adapter are counted on a model without values. Activations are measured: real training steps of models with
the same widths, but 2 and 3 decoder layers and 1 and 2 samples, on the CPU; what a layer and a sample add is linear.
"""

import math
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from a3tune.adapters import add_adapter
from a3tune.config import RunConfig
from a3tune.models import choose_device
from a3tune.training.collate import IGNORED, Collator, RegionSource, learning
from a3tune.training.step import Alignment, Counts
from a3tune.types import Sample
from a3tune.vlm.quantize import quantised_weights
from a3tune.vlm.shrunk import Shrinker

_BITS = {None: 0.0, "8bit": 1.0, "4bit": 0.5 + 1 / 64 + 1 / 4096}
"""Bytes of a quantised weight; NF4 has an 8-bit constant for 64 weights, and a constant of fp32 for 256 of these."""
_FEW = 2
"""Decoder layers of the smaller model; the larger one has one more."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device, at the moment when the most are taken."""

    weights: int
    """Of the frozen model."""
    adapter: int
    """Its weights and their optimiser's state."""
    step: int
    """Activations of the largest batch; or, where that is more, gradients and what the optimiser needs for a step."""

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.step


def steps_of(config: RunConfig, rows: int, processes: int = 1) -> int:
    """Optimiser steps of a training on so many rows."""
    settings = config.training
    batches = math.ceil(math.ceil(rows / processes) / settings.batch_size)
    return settings.max_steps or math.ceil(settings.epochs * math.ceil(batches / settings.accumulation))


def estimate_memory(config: RunConfig, samples: Sequence[Sample], regions_for: RegionSource) -> Memory:
    """What a training on these samples takes on one device; the model's weights are not read.

    The batch is made of the longest questions and answers. Raises as `load_vlm` and `Collator`.
    """
    shrinker = Shrinker(config.model.path)
    cuda = choose_device(config.model.device).type == "cuda"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(
        config.model.dtype, torch.bfloat16 if cuda else torch.float32
    )
    whole: Any = shrinker.whole()
    weights = _weights(whole, dtype.itemsize, config.model.quantization)
    adapter = 4 * _trainable(add_adapter(whole, config.adapter))
    longest = sorted(samples, key=lambda one: -len(one.prompt) - len(one.answer))[:2]
    longest = [longest[0], longest[-1]]
    one, two = (
        [
            _peak(config, shrinker, layers, longest[:count], regions_for, dtype, mixed=cuda)
            for layers in (_FEW, _FEW + 1)
        ]
        for count in (1, 2)
    )
    # Of the whole model, by what a layer adds; then of the whole batch, by what a sample adds.
    small, large = (few + (shrinker.layers - _FEW) * (more - few) for few, more in (one, two))
    activations = small + (min(config.training.batch_size, len(samples)) - 1) * (large - small)
    # Adam keeps two numbers for each weight; its step holds the gradients and as much again.
    return Memory(weights, 3 * adapter, max(int(activations), 2 * adapter))


def _weights(model: Any, itemsize: int, quantization: str | None) -> int:
    total = sum(weight.numel() for weight in model.parameters())
    quantised = quantised_weights(model) if quantization else 0
    return int((total - quantised) * itemsize + quantised * _BITS[quantization])


def _trainable(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _peak(
    config: RunConfig,
    shrinker: Shrinker,
    layers: int,
    samples: Sequence[Sample],
    regions_for: RegionSource,
    dtype: torch.dtype,
    *,
    mixed: bool,
) -> int:
    """Most bytes alive within forward and backward pass of a small model, besides its weights."""
    vlm = shrinker.model(layers, dtype)
    if config.training.activation_checkpointing:
        vlm.model.activation_checkpointing_enable({"use_reentrant": False})
    settings = config.adapter
    model: Any = add_adapter(vlm.model, settings, balance=config.active_balance > 0)
    model.train()
    batch = Collator(vlm, regions_for, membership=config.alignment.membership)(samples)
    balance = config.active_balance
    alignment = Alignment(model, vlm.processor, load_balance=balance, **asdict(_few_heads(config, model)))
    alignment.progress = 0.0
    counts = Counts(int(batch["labels"].ne(IGNORED).sum()), int(learning(batch).sum()))
    precision = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    with Alive() as alive:
        with precision:
            loss, _ = alignment.loss(model, batch, counts)
        loss.backward()
    return alive.most


def _few_heads(config: RunConfig, model: Any) -> Any:
    """The alignment, over no more heads than the small model has, chosen by its batch."""
    text = model.config.get_text_config()
    total = text.num_hidden_layers * text.num_attention_heads
    heads = config.alignment.heads
    heads = min(heads, total) if isinstance(heads, int) else heads
    return replace(config.active_alignment, heads=heads, head_selection="batch")


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is open, for as long as each is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if _is_tensor(tensor) and id(tensor.untyped_storage()) not in given:
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
