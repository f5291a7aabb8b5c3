"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the image is resized to whole blocks of m x m patches, one token per block.

What follows inside the towers (patches sorted into blocks, windows of attention and back) keeps the blocks row-major.
"""

from typing import Any

import numpy as np

from a3tune.compat.processing import smart_resize
from a3tune.errors import DataError
from a3tune.vlm.grids.resize import cells, grid


def qwen_boxes(config: Any, processor: Any, height: int, width: int) -> np.ndarray:
    """One box per merged block, row-major. Raises `DataError` for an image that is too long and thin for the model."""
    images = processor.image_processor
    block = images.patch_size * images.merge_size
    y_new, x_new = height, width
    if images.do_resize:
        try:
            y_new, x_new = smart_resize(height, width, block, images.size["shortest_edge"], images.size["longest_edge"])
        except ValueError as error:
            raise DataError(
                f"image of {width} x {height} pixels: the model cannot take it: {error}. Crop it."
            ) from error
    rows, columns = y_new // block, x_new // block
    return grid(cells(rows, height / rows), cells(columns, width / columns))
