"""LLaVA-NeXT and LLaVA-OneVision: the whole image squashed into one tile, then tiles of the image at a higher size."""

import math
from typing import Any

import numpy as np

from a3tune.compat.processing import select_best_resolution
from a3tune.errors import ModelError
from a3tune.vlm.grids.llava import check_one_token_per_patch
from a3tune.vlm.grids.resize import cells, grid


def llava_next_boxes(config: Any, processor: Any, height: int, width: int) -> np.ndarray:
    """The base tile, then the rows of the tiled image without its padding; each row ends with a token without a place.

    Boxes of the base tile and of the tiled image lie over each other.
    """
    check_one_token_per_patch(processor)
    return _boxes(config, processor.image_processor, height, width)


def llava_onevision_boxes(config: Any, processor: Any, height: int, width: int) -> np.ndarray:
    """As LLaVA-NeXT; a tiled image of too many tokens is shrunk, so that a token stands for several patches."""
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    return _boxes(config, processor.image_processor, height, width, most)


def _boxes(config: Any, images: Any, height: int, width: int, most_tiles: int | None = None) -> np.ndarray:
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    side = tile // patch
    if _tile_size(images) != tile:
        raise ModelError(
            f"{type(images).__name__}: cuts tiles of {_tile_size(images)} pixels, but the vision tower takes {tile}. "
            "Set size and crop_size in preprocessor_config.json of the model."
        )
    base = grid(cells(side, patch * height / tile), cells(side, patch * width / tile))
    canvas = select_best_resolution((height, width), config.image_grid_pinpoints)
    y_cells, x_cells = _unpadded(canvas, tile, patch, height, width)
    if most_tiles:
        ratio = math.sqrt(len(y_cells) * len(x_cells) / (most_tiles * side**2))
        if ratio > 1.1:
            y_cells, x_cells = (_merged(spans, int(len(spans) // ratio)) for spans in (y_cells, x_cells))
    tiled = grid(y_cells, x_cells).reshape(len(y_cells), len(x_cells), 4)
    row_ends = np.full((len(y_cells), 1, 4), np.nan)
    return np.concatenate([base, np.concatenate([tiled, row_ends], axis=1).reshape(-1, 4)])


def _tile_size(images: Any) -> int:
    crop, size = images.crop_size, images.size
    return (crop and crop["height"]) or size["height"] or size["shortest_edge"]


def _unpadded(canvas: tuple[int, int], tile: int, patch: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches along y `[rows, 2]` and x `[columns, 2]` of the image that was fitted into the canvas, in its own pixels.

    The image is padded on both sides in pixels, and unpadded in whole patches by its aspect ratio
    (transformers' `get_patch_output_size` and `unpad_image`, both rounded in their own way).
    """
    side = tile // patch
    rows, columns = (canvas[0] // tile * side, canvas[1] // tile * side)
    y_scale, x_scale = canvas[0] / height, canvas[1] / width
    y_new, x_new = canvas
    if x_scale < y_scale:
        y_new = min(math.ceil(height * x_scale), canvas[0])
    else:
        x_new = min(math.ceil(width * y_scale), canvas[1])
    y_cut = x_cut = 0
    if width / height > columns / rows:
        y_cut = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        x_cut = (columns - int(round(width * (rows / height), 7))) // 2

    def patches(count: int, cut: int, view: int, new: int, size: int) -> np.ndarray:
        # A tower whose patches do not fill a tile leaves the last pixels of every tile unseen.
        starts = cells(side, patch) + tile * np.arange(count // side)[:, None, None]
        return (starts.reshape(-1, 2)[cut : count - cut] - (view - new) // 2) * (size / new)

    return patches(rows, y_cut, canvas[0], y_new, height), patches(columns, x_cut, canvas[1], x_new, width)


def _merged(spans: np.ndarray, count: int) -> np.ndarray:
    """The cells when they are shrunk to `count`: each new one is an equal share of the row of old ones."""
    first = np.arange(count) * len(spans) / count
    low, high = np.floor(first).astype(int), np.ceil(first + len(spans) / count - 1e-9).astype(int) - 1
    size = spans[:, 1] - spans[:, 0]
    end = first + len(spans) / count
    return np.stack([spans[low, 0] + (first - low) * size[low], spans[high, 0] + (end - high) * size[high]], axis=1)
