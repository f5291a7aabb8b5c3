"""Stopping a training run between two steps, on every process at the same one. Knows signals, not what is trained."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import parent_process
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback

from a3tune.machine.signals import Stopped, handling, leave_to_parent

logger = logging.getLogger(__name__)


class Interrupted(Stopped):
    """The user stopped the training; a checkpoint was saved. The message says how to go on."""


class StopOnRequest(TrainerCallback):
    """Ends the training after the running step, with a checkpoint, once `requested` is set on any process."""

    def __init__(self) -> None:
        self.requested = False
        self.number: int = signal.SIGTERM
        """Of the signal; what launchers send, on a process that learnt of it from another."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        # A process that stopped alone would leave the others waiting for its gradients.
        share: Any = reduce(torch.tensor(float(self.requested), device=args.device))
        self.requested = bool(share > 0)
        if self.requested and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control


@contextmanager
def stopping_on_interrupt(stop: StopOnRequest, *, processes: int = 1) -> Iterator[None]:
    """A first signal requests a stop, a second one ends at once. Elsewhere than in the main thread nothing changes.

    With several `processes`, and in a worker of another one, a second signal is ignored: who started them sends one of
    their own after that of the terminal.
    """
    process, handlers = os.getpid(), ExitStack()
    alone = processes == 1 and parent_process() is None

    def request(number: int, _: Any) -> None:
        if os.getpid() != process:  # a data-loading process in its first moments inherited this
            return
        if not stop.requested:
            logger.warning("interrupted: finishing this step and saving a checkpoint (once more to stop at once)")
            stop.requested, stop.number = True, number
        if alone:
            handlers.close()

    with handlers:
        handlers.enter_context(handling(request))
        yield


class Undisturbed:
    """What a data-loading process does first (`worker_init_fn`): the step that is finished needs its batches."""

    def __init__(self, first: Callable[[int], None] | None) -> None:
        self._first = first

    def __call__(self, worker: int) -> None:
        leave_to_parent(terminable=False)
        if self._first is not None:
            self._first(worker)
