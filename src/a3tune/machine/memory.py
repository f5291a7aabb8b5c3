"""How much memory this process takes. Knows no models."""

import resource
import sys

_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes of what the system counts in."""


def peak_bytes() -> int:
    """The most main memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


def in_use() -> str:
    """The most memory so far, in words: of the machine, and of the GPU where one is in use."""
    torch = sys.modules.get("torch")
    words = f"{peak_bytes() / 1e9:.1f} GB of memory"
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return words
    return f"{words}, {torch.cuda.max_memory_reserved() / 1e9:.1f} GB of the GPU's"
