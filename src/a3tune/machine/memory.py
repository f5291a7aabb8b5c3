"""How much memory this process takes, in words. Knows no models."""

import sys

from a3tune.machine.portable import peak_bytes


def in_use() -> str:
    """The most memory so far, of the machine and of the GPU in use; empty where the system does not say."""
    torch, peak = sys.modules.get("torch"), peak_bytes()
    words = [] if peak is None else [f"{peak / 1e9:.1f} GB of memory"]
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        words.append(f"{torch.cuda.max_memory_reserved() / 1e9:.1f} GB of the GPU's")
    return ", ".join(words)
