"""Tiny random models of every supported family, saved in folders as users have theirs."""

from collections.abc import Callable
from pathlib import Path

from zoo import anyres, llava, qwen, square, tiles

ZOO: dict[str, Callable[[Path], None]] = {
    **llava.MODELS,
    **anyres.MODELS,
    **square.MODELS,
    **qwen.MODELS,
    **tiles.MODELS,
}
"""Name -> saves model and processor into a folder."""
