"""Time, memory and waits of a call on a GPU; on a processor wall time and its tensors, to try all else there."""

import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from measure import Spread
from tensors import peak_bytes


def seconds(call: Callable[[], Any], repetitions: int) -> Spread:
    """Seconds of each of some calls: between two CUDA events, or on the clock of the wall. One more goes before."""
    call()
    return Spread.of([_seconds(call) for _ in range(repetitions)])


def _seconds(call: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def peak(call: Callable[[], Any]) -> int:
    """The most bytes of tensors at once, with all that was there before; on a processor without."""
    if not torch.cuda.is_available():
        return peak_bytes(call)
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


def waits(call: Callable[[], Any]) -> int | None:
    """How often the processor waits for the GPU within a call, as far as torch notices it; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing" in str(warning.message) for warning in told)


def tidy() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def why(error: BaseException) -> str:
    """Why something was not measured, in a few words."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
