"""Idefics3, SmolVLM and InternVL: the image is stretched to whole tiles; a small picture of all of it comes last.

Every tile gives side x side tokens, row-major (pixel shuffle merges neighbouring patches into one). Stretching keeps no
aspect ratio and needs no padding, so the boxes are equal cells: of the tiles, tile by tile, then of the whole image.
"""

import math
from typing import Any

import numpy as np

from a3tune.compat.processing import get_optimal_tiled_canvas, get_resize_output_image_size
from a3tune.errors import ModelError
from a3tune.vlm.grids.resize import cells, grid


def idefics_boxes(config: Any, processor: Any, height: int, width: int) -> np.ndarray:
    """Idefics3 and SmolVLM: tiles as the processor splits the image, then the global image.

    Raises `ModelError` where the processor writes another number of tokens per tile than the model makes.
    """
    images = processor.image_processor
    tile = images.max_image_size["longest_edge"]
    side = _side(tile, config.vision_config.patch_size * config.scale_factor, processor, "image_seq_len")
    rows, columns = _idefics_tiles(images, tile, height, width) if images.do_image_splitting else (1, 1)
    return _tiled(rows, columns, side, height, width)


def internvl_boxes(config: Any, processor: Any, height: int, width: int) -> np.ndarray:
    """InternVL: the tiling whose shape is closest to the image's, then the thumbnail.

    Raises `ModelError` where the processor writes another number of tokens per tile than the model makes.
    """
    images = processor.image_processor
    tile, patch = images.size["height"], config.vision_config.patch_size[0]
    side = _side(tile, round(patch / config.downsample_ratio), processor, "image_seq_length")
    # The processor always cuts into tiles, whatever `crop_to_patches` of its image processor says.
    columns, rows = get_optimal_tiled_canvas((height, width), (tile, tile), images.min_patches, images.max_patches)
    return _tiled(rows, columns, side, height, width)


def _side(tile: int, block: int, processor: Any, key: str) -> int:
    """Tokens along one side of a tile of `tile` x `tile` pixels, each of which stands for `block` x `block` pixels."""
    side, rest = divmod(tile, block)
    if rest or side**2 != getattr(processor, key):
        raise ModelError(
            f"{type(processor).__name__}: {key}={getattr(processor, key)}, but a tile of {tile} pixels cut into blocks "
            f"of {block} gives {tile / block:g} x {tile / block:g} tokens. Correct the processor's files of the model."
        )
    return side


def _tiled(rows: int, columns: int, side: int, height: int, width: int) -> np.ndarray:
    """Cells of every tile, tile by tile, then of the whole image; only the latter where one tile is all there is."""
    whole = _cut(side, side, height, width)
    if rows == columns == 1:
        return whole
    fine = _cut(rows * side, columns * side, height, width).reshape(rows, side, columns, side, 4)
    return np.concatenate([fine.swapaxes(1, 2).reshape(-1, 4), whole])


def _cut(rows: int, columns: int, height: int, width: int) -> np.ndarray:
    return grid(cells(rows, height / rows), cells(columns, width / columns))


def _idefics_tiles(images: Any, tile: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tiles, rounded as the processor's `resize_for_vision_encoder` does.

    Its `get_number_of_image_patches` rounds in another way, a row off for some images where the longest edge is not a
    multiple of the tile.
    """
    if images.do_resize:
        if images.size["longest_edge"]:
            blank = np.broadcast_to(np.uint8(0), (height, width))  # has a shape and takes no memory
            height, width = get_resize_output_image_size(blank, images.size["longest_edge"])
        else:
            height, width = images.size["height"], images.size["width"]
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / tile)
        return math.ceil(int(columns * tile / ratio) / tile), columns
    rows = math.ceil(height / tile)
    return rows, math.ceil(int(rows * tile * ratio) / tile)
