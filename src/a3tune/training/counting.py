"""How many samples and tokens an optimiser step learns from, over its passes and all processes. Knows no loss."""

from collections.abc import Sized
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor
from transformers import Trainer

from a3tune.training.collate import IGNORED, check_batch, learning


class CountingTrainer(Trainer):
    """A Trainer that knows what its steps are made of."""

    _collecting = False
    """While the batches of a step of the training are taken, not those of an evaluation."""
    samples_in_step = 0
    """Samples that learn in the running optimiser step, over all processes: fewer at the end of an epoch."""

    @property
    def alone(self) -> bool:
        """Whether no other process waits for this one."""
        return self.accelerator.distributed_type == DistributedType.NO

    @property
    def samples_per_step(self) -> int:
        """Samples of a whole optimiser step, over all processes."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(tensor)  # pyright: ignore[reportReturnType]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        self._collecting = True
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        self._collecting = False
        for batch in batches:
            check_batch(batch)
        samples = sum(learning(batch).sum() for batch in batches)
        self.samples_in_step = int(self.total(torch.as_tensor(samples, device=self.args.device)))
        return batches, tokens

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        # accelerate fills up the last batches of an epoch with samples of its beginning, so that every process has as
        # many. Without a token to learn they count for nothing (`collate.learning`), here, in the losses and the logs.
        if self._collecting and self._filled_up:
            size, processes = self.args.per_device_train_batch_size, self.accelerator.num_processes
            if left := len(self.train_dataset) % (size * processes):  # pyright: ignore[reportArgumentType]
                mine = min(max(left - size * self.accelerator.process_index, 0), size)
                batch_samples[-1]["labels"][mine:] = IGNORED
        return super()._get_num_items_in_batch(batch_samples, device)

    @property
    def _filled_up(self) -> bool:
        """Whether the batch at hand may be one that accelerate has filled up."""
        last = not self.alone and self.accelerator.gradient_state.end_of_dataloader
        return last and not self.args.dataloader_drop_last and isinstance(self.train_dataset, Sized)
