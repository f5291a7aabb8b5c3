"""Stopping a training run between two steps, on every process at the same one. Knows signals, not what is trained."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """The user stopped the training; a checkpoint was saved. The message says how to go on."""


class StopOnRequest(TrainerCallback):
    """Ends the training after the running step, with a checkpoint, once `requested` is set on any process."""

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        # A process that stopped alone would leave the others waiting for its gradients.
        share: Any = reduce(torch.tensor(float(self.requested), device=args.device))
        self.requested = bool(share > 0)
        if self.requested and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control


@contextmanager
def stopping_on_interrupt(stop: StopOnRequest, *, processes: int = 1) -> Iterator[None]:
    """Ctrl-C or SIGTERM requests a stop, a second one ends at once. Elsewhere than in the main thread nothing changes.

    With several `processes` a second signal is ignored: launchers send one of their own after that of the terminal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous, process = {name: signal.getsignal(name) for name in SIGNALS}, os.getpid()

    def restore() -> None:
        for name, handler in previous.items():
            signal.signal(name, handler)

    def request(number: int, _: Any) -> None:
        if os.getpid() != process:  # a data-loading process inherited this: Ctrl-C is for the one that trains
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if not stop.requested:
            logger.warning("interrupted: finishing this step and saving a checkpoint (Ctrl-C again to stop at once)")
        stop.requested = True
        if processes == 1:
            restore()

    for name in SIGNALS:
        signal.signal(name, request)
    try:
        yield
    finally:
        restore()
