"""What image processors share: cells of a grid, the resize, the centre crop.

Knows sizes in pixels; no families.
"""

from typing import Any

import numpy as np

from a3tune.errors import ModelError


def cells(count: int, step: float, start: float = 0.0) -> np.ndarray:
    """`count` neighbouring intervals of length `step` from `start` on: float64 `[count, 2]`."""
    first = start + step * np.arange(count, dtype=np.float64)
    return np.stack([first, first + step], axis=1)


def grid(y_cells: np.ndarray, x_cells: np.ndarray) -> np.ndarray:
    """Boxes of a row-major grid: `[rows, 2]` and `[columns, 2]` -> float64 `[rows * columns, 4]` (x0, y0, x1, y1)."""
    y0, x0 = np.meshgrid(y_cells[:, 0], x_cells[:, 0], indexing="ij")
    y1, x1 = np.meshgrid(y_cells[:, 1], x_cells[:, 1], indexing="ij")
    return np.stack([x0, y0, x1, y1], axis=-1).reshape(-1, 4)


def resized(images: Any, height: int, width: int) -> tuple[int, int]:
    """Size after the processor's resize; the longer side is rounded down as transformers does.

    Raises `ModelError` for a kind of resize that is not known.
    """
    size = images.size
    if size["height"] and size["width"]:
        return size["height"], size["width"]
    if size["shortest_edge"] and not size["longest_edge"]:
        scale, short = size["shortest_edge"], min(height, width)
        return int(scale * height / short), int(scale * width / short)
    raise ModelError(
        f"{type(images).__name__}: size={dict(size)} is not supported; expected 'shortest_edge', or 'height' and "
        "'width'. Set one of them in preprocessor_config.json of the model."
    )


def crop_start(images: Any, size: int, view: int) -> int:
    """First pixel of the centre crop; negative where a smaller image is padded (the backends round it differently)."""
    if size < view and images.backend == "torchvision":
        return -((view - size) // 2)
    return (size - view) // 2
