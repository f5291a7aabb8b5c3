"""Where the device has too little memory for a pass: smaller passes, the same step. Knows batches, no loss."""

import logging
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from a3tune.adapters import balance_loss
from a3tune.errors import AdapterError, RunError
from a3tune.training.checkpoint import CheckpointingTrainer
from a3tune.training.collate import Collator
from a3tune.types import Sample

logger = logging.getLogger(__name__)


class SmallerPassesTrainer(CheckpointingTrainer):
    """A Trainer that takes a step in smaller passes where the device has too little memory for the whole.

    Both losses are sums over samples and tokens, divided by those of the whole step, so passes of any size add up to
    the same gradient. What the failed pass left behind is unknown: the step starts again.
    """

    collator: Collator

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._largest = self.args.per_device_train_batch_size
        """Samples of a forward pass that the memory is known or hoped to hold."""
        self._begun: list[dict[str, Any]] = []
        """Batches of the running step that were begun."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        self._begun, self._before = [], self._traces()
        return batches, tokens

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._begun.append(inputs)
        waiting = [inputs]
        while True:
            try:
                for batch in waiting:
                    loss = self._in_passes(model, batch, num_items_in_batch)
                return loss  # pyright: ignore[reportPossiblyUnboundVariable]
            except torch.OutOfMemoryError as error:
                self._halve(inputs["sample_ids"], error)
            # Only out here has the traceback let go of the pass's activations.
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            model.zero_grad()
            self._go_back(self._before)
            waiting = self._begun

    def _in_passes(self, model: Any, batch: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        ids = batch["sample_ids"]
        if len(ids) <= self._largest:
            return super().training_step(model, batch, num_items_in_batch)
        total = torch.zeros((), device=self.args.device)
        for start in range(0, len(ids), self._largest):
            # Made anew: how a batch is cut differs between model families.
            part = self.collator([self._by_id[name] for name in ids[start : start + self._largest]])
            total += super().training_step(model, part, num_items_in_batch)
        return total

    @cached_property
    def _by_id(self) -> dict[str, Sample]:
        dataset: Any = self.train_dataset
        return {sample.id: sample for sample in dataset}

    def _halve(self, ids: list[str], error: Exception) -> None:
        """Smaller passes from now on. Raises RunError where that cannot be."""
        size, failed = self.args.per_device_train_batch_size, min(len(ids), self._largest)
        if not self.alone and failed > 1:
            # The others wait for this process within the very pass that failed.
            half = 1 if size % 2 else size // 2
            raise RunError(
                f"step {self.state.global_step + 1}: a device has too little memory for {size} samples at once. Use "
                f"training.batch_size={half} and {size // half} times the training.accumulation: the run goes on from "
                "its last checkpoint with the same samples per step"
            ) from error
        if failed == 1:
            raise RunError(
                f"step {self.state.global_step + 1}: the device has too little memory for one sample "
                f"({', '.join(ids)}); training.activation_checkpointing, model.quantization or a smaller image may help"
            ) from error
        self._largest = (failed + 1) // 2
        logger.warning(
            "too little memory for %d samples at once: going on with %d, in more passes for the same effective batch; "
            "training.batch_size=%d with a larger training.accumulation saves making batches twice",
            failed,
            self._largest,
            self._largest,
        )

    def _traces(self) -> tuple[Any, ...]:
        """What passes leave behind outside of the gradients."""
        return self.sums.copy(), self.alignment.state_dict()

    def _go_back(self, traces: tuple[Any, ...]) -> None:
        sums, alignment = traces
        self.sums = sums.copy()
        self.alignment.load_state_dict(alignment)
        with suppress(AdapterError):  # nothing to take out
            balance_loss(self.model)  # pyright: ignore[reportArgumentType]
