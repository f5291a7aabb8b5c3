"""Per family: image token -> box in the ORIGINAL image, through exactly the geometry of its image processor.

Knows how a family cuts an image into tokens; knows no masks, prompts or weights. Every boxes function takes (model
config, processor, height, width) and returns float64 `[N, 4]`, one row for each image token of one image, in order.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from a3tune.vlm.load import Vlm


def token_boxes(vlm: "Vlm", height: int, width: int) -> np.ndarray:
    """Box of every image token of an image of `height` x `width` pixels.

    Returns float64 `[N, 4]`: x0, y0, x1, y1 in pixels of the original image, in the order of the image tokens. Parts of
    a box outside the image are padding; a token that shows no place (the end of a row in LLaVA-NeXT) has a box of NaN.
    Raises `ModelError` where the processor's geometry is not known.
    """
    return vlm.family.boxes(vlm.model.config, vlm.processor, height, width)
