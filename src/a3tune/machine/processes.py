"""The processes of one command, one per device, as `accelerate launch` starts them. Knows who is first; no model.

Alone, nothing here costs anything: torch is not even loaded.
"""

import os
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def count() -> int:
    """How many there are; 1 unless a launcher started several."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    """Which one this is, from 0 on; the first writes files and talks to the user."""
    return int(os.environ.get("RANK", "0"))


def join(*, cpu: bool) -> None:
    """Find the others, and make this process's device the current one."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu)


def wait() -> None:
    """Until all are here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def gather(items: list[T]) -> list[T]:
    """What all processes have, in their order. All must call this."""
    if count() == 1:
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def from_first(value: T) -> T:
    """What the first process has. All must call this."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def total(tensor: "Tensor") -> "Tensor":
    """The sum over all processes of a training, whoever has started them. All must call this."""
    import torch.distributed

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    summed = tensor.clone()
    torch.distributed.all_reduce(summed)
    return summed
