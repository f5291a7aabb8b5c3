"""Who watches answers while they grow, and may end them. Knows tokens; not who is told."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteria


class Watcher(Protocol):
    """What `generate` tells meanwhile."""

    def before_pass(self) -> None:
        """Before every pass of the language model; what it raises ends the answering."""
        ...

    def after_token(self, tokens_BS: Tensor) -> Sequence[bool]:
        """The answers so far, int64 `[B, S_new]`, after each token of methods that choose one after the other in one
        branch; those that search (beams) are not told. Returns which answers end here."""
        ...


_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watching(watcher: Watcher | None) -> Iterator[None]:
    """Let `watcher` watch. Not a parameter of `base.Decoder`: methods of users' own would all have to hand it on."""
    before = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(before)


def watched(length: int) -> list[StoppingCriteria]:
    """What tells the watcher, if there is one, of every token behind a prompt of `length`."""
    watcher = _WATCHER.get()
    return [] if watcher is None else [_Watched(watcher, length)]


class _Watched(StoppingCriteria):
    def __init__(self, watcher: Watcher, length: int) -> None:
        self._watcher, self._length = watcher, length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = self._watcher.after_token(input_ids[:, self._length :])
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)
