"""Families that squash the image, whatever its shape, into one square view: PaliGemma, Gemma 3."""

import math
from typing import Any

import numpy as np

from a3tune.vlm.grids.resize import cells, grid


def paligemma_boxes(config: Any, processor: Any, height: int, width: int) -> np.ndarray:
    """Resize to a square, then one token per patch."""
    vision = config.vision_config
    return _view(vision.image_size // vision.patch_size, vision.patch_size / vision.image_size, height, width)


def gemma3_boxes(config: Any, processor: Any, height: int, width: int) -> np.ndarray:
    """Resize to a square, then blocks of patches pooled to one token; with pan and scan also each crop in this way."""
    vision, side = config.vision_config, math.isqrt(config.mm_tokens_per_image)
    pooled = vision.image_size // vision.patch_size // side
    share = pooled * vision.patch_size / vision.image_size
    views = [(0, 0, height, width), *_crops(processor, height, width)]
    return np.concatenate([_view(side, share, y1 - y0, x1 - x0, y0, x0) for y0, x0, y1, x1 in views])


def _view(side: int, share: float, height: int, width: int, top: int = 0, left: int = 0) -> np.ndarray:
    """Boxes of `side` x `side` tokens, each of which takes that `share` of the sides of one squashed view."""
    return grid(cells(side, share * height, top), cells(side, share * width, left))


def _crops(processor: Any, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """The crops of pan and scan, (y0, x0, y1, x1) in pixels; none where it is off or the image is not long enough."""
    # The processor hands its own settings to the image processor, whose settings then do not count.
    given, images = getattr(processor, "images_kwargs", {}), processor.image_processor

    def setting(name: str) -> Any:
        return given.get(name, getattr(images, name))

    long, short = max(height, width), min(height, width)
    if not setting("do_pan_and_scan") or long / short < setting("pan_and_scan_min_ratio_to_activate"):
        return []
    least = setting("pan_and_scan_min_crop_size")
    count = min(math.floor(long / short + 0.5), long // least)
    count = min(max(2, count), setting("pan_and_scan_max_num_crops"))
    step = math.ceil(long / count)
    if min(step, short) < least:
        return []
    starts = range(0, step * count, step)
    if width >= height:
        return [(0, start, height, min(start + step, width)) for start in starts]
    return [(start, 0, min(start + step, height), width) for start in starts]
