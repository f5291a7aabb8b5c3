"""Per family: image token -> box in the ORIGINAL image, through exactly the geometry of its image processor.

Knows how a family cuts an image into tokens; knows no masks, prompts or weights.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from a3tune.errors import ModelError

if TYPE_CHECKING:
    from a3tune.vlm.load import Vlm


def token_boxes(vlm: "Vlm", height: int, width: int) -> np.ndarray:
    """Box of every image token of an image of `height` x `width` pixels.

    Returns float64 `[N, 4]`: x0, y0, x1, y1 in pixels of the original image, in the order of the image tokens
    (row-major). Parts of a box outside the image are padding. Raises `ModelError` where the processor's geometry is not
    known.
    """
    return vlm.family.boxes(vlm.model.config, vlm.processor, height, width)


def llava_boxes(config: Any, processor: Any, height: int, width: int) -> np.ndarray:
    """LLaVA: pad to a square (only `LlavaImageProcessor`), resize, centre crop, then a grid of square patches."""
    extra = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    if extra != 0:
        raise ModelError(
            f"{type(processor).__name__}: num_additional_image_tokens={processor.num_additional_image_tokens} with "
            f"vision_feature_select_strategy={processor.vision_feature_select_strategy!r} gives {extra:+d} image "
            "tokens beside the patches; a3tune needs one token per patch. Correct processor_config.json of the model."
        )
    patch = config.vision_config.patch_size
    x_edges, y_edges = _patch_edges(processor.image_processor, patch, height, width)
    y0, x0 = np.meshgrid(y_edges[:-1], x_edges[:-1], indexing="ij")
    y1, x1 = np.meshgrid(y_edges[1:], x_edges[1:], indexing="ij")
    return np.stack([x0, y0, x1, y1], axis=-1).reshape(-1, 4)


def _patch_edges(images: Any, patch: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Patch borders along x and y, in original pixels, for a processor that pads, resizes and crops in this order."""
    y_pad = x_pad = 0
    y_size, x_size = height, width
    if hasattr(images, "pad_to_square") and images.do_pad:
        square = max(height, width)
        y_pad, x_pad = (square - height) // 2, (square - width) // 2
        y_size = x_size = square
    y_new, x_new = _resized(images, y_size, x_size) if images.do_resize else (y_size, x_size)
    y_view, x_view = (
        (images.crop_size["height"], images.crop_size["width"]) if images.do_center_crop else (y_new, x_new)
    )
    pads_down = images.backend == "torchvision"

    def edges(size: int, new: int, view: int, pad: int) -> np.ndarray:
        processed = np.arange(view // patch + 1) * patch + _crop_start(new, view, pads_down)
        return processed * (size / new) - pad

    return edges(x_size, x_new, x_view, x_pad), edges(y_size, y_new, y_view, y_pad)


def _resized(images: Any, height: int, width: int) -> tuple[int, int]:
    """Size after the processor's resize; the longer side is rounded down as transformers does."""
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


def _crop_start(size: int, view: int, pads_down: bool) -> int:
    """First pixel of the centre crop; negative where a smaller image is padded (the backends round it differently)."""
    if size < view and pads_down:
        return -((view - size) // 2)
    return (size - view) // 2
