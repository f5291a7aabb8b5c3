"""The memory of tensors, exact to the byte: what torch's allocator gave out, not what the process holds."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes of CPU tensors that `call` holds at once, beyond those held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    results: Any = found.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max(initial=0))
