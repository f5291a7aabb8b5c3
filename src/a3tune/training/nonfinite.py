"""A loss that is no number ends a training on all processes at once, and names its samples. Knows values, no model."""

from collections.abc import Callable
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from a3tune.errors import RunError
from a3tune.training.step import StepLosses


class NonFiniteError(RunError):
    """A loss is NaN or infinite. Every process raises it in the same forward pass."""

    def __init__(self, step: int, batches: list[dict[str, Any]]) -> None:
        self.step = step
        self.batches = batches
        """One per process: `samples`, their ids, and the losses by name."""
        broken = [batch for batch in batches if batch["broken"]]
        super().__init__(
            f"step {step}: the loss is {broken[0]['loss']} on samples "
            f"{', '.join(name for batch in broken for name in batch['samples'])}. Look at them; a lower "
            "training.learning_rate or a training.max_grad_norm may help"
        )


def check_finite(losses: StepLosses, sample_ids: list[str], step: int, total: Callable[[Tensor], Tensor]) -> None:
    """Raise NonFiniteError on every process if the loss of any is not finite. `total` sums over all processes."""
    broken = ~losses.total.detach().isfinite()
    # The others learn of it here, before they wait for gradients that will not come.
    if total(broken.float()) > 0:
        parts = {"loss_llm": losses.llm, "loss_align": losses.align, "loss": losses.total}
        values = {name: float(value.detach()) for name, value in parts.items() if value is not None}
        raise NonFiniteError(step, gather_object([{"samples": sample_ids, "broken": bool(broken), **values}]))
