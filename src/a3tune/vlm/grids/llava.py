"""LLaVA: one square view of the image, cut into patches."""

from typing import Any

import numpy as np

from a3tune.errors import ModelError
from a3tune.vlm.grids.resize import cells, crop_start, grid, resized

WITH_CLASS_TOKEN = ("clip_vision_model", "dinov2")
"""Vision towers whose output begins with a class token."""
FIXED_SIZE = ("clip_vision_model", "siglip_vision_model")
"""Those that take images of one size."""


def llava_boxes(config: Any, processor: Any, height: int, width: int) -> np.ndarray:
    """Pad to a square (only `LlavaImageProcessor`), resize, centre crop, then a grid of square patches."""
    check_one_token_per_patch(processor)
    images, patch = processor.image_processor, config.vision_config.patch_size
    y_pad = x_pad = 0
    y_size, x_size = height, width
    if hasattr(images, "pad_to_square") and images.do_pad:
        y_size = x_size = max(height, width)
        y_pad, x_pad = (y_size - height) // 2, (x_size - width) // 2
    y_new, x_new = resized(images, y_size, x_size) if images.do_resize else (y_size, x_size)
    y_view, x_view = (
        (images.crop_size["height"], images.crop_size["width"]) if images.do_center_crop else (y_new, x_new)
    )
    tower = config.vision_config
    if tower.model_type in FIXED_SIZE and (y_view, x_view) != (tower.image_size, tower.image_size):
        raise ModelError(
            f"{type(processor).__name__}: cuts images of {height} x {width} pixels to {y_view} x {x_view}, the vision "
            f"tower takes {tower.image_size} x {tower.image_size}. Make processor_config.json and config.json agree."
        )
    y_cells = cells(y_view // patch, patch, crop_start(images, y_new, y_view)) * (y_size / y_new) - y_pad
    x_cells = cells(x_view // patch, patch, crop_start(images, x_new, x_view)) * (x_size / x_new) - x_pad
    return grid(y_cells, x_cells)


def check_one_token_per_patch(processor: Any) -> None:
    """ModelError where class tokens stand among the image tokens, as the processor's settings say."""
    extra = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    if extra != 0:
        raise ModelError(
            f"{type(processor).__name__}: num_additional_image_tokens={processor.num_additional_image_tokens} with "
            f"vision_feature_select_strategy={processor.vision_feature_select_strategy!r} gives {extra:+d} image "
            "tokens beside the patches; a3tune needs one token per patch. Correct processor_config.json of the model."
        )


def complete_llava(processor: Any, config: Any) -> None:
    """Tell a processor of an older checkpoint how many tokens an image takes.

    Raises ModelError for a layer that the vision tower does not have.
    """
    depth, layers = config.vision_config.num_hidden_layers, config.vision_feature_layer
    for layer in layers if isinstance(layers, list | tuple) else [layers]:
        if type(layer) is not int or not layer or not -depth - 1 <= layer <= depth:
            raise ModelError(
                f"config.json: vision_feature_layer: expected one of the vision tower's {depth} layers, "
                f"got {str(layer)[:80]}"
            )
    processor.patch_size = config.vision_config.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_additional_image_tokens = int(config.vision_config.model_type in WITH_CLASS_TOKEN)
