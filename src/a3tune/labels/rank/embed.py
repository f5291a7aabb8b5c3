"""What rankers share: square pictures, and items to unit vectors in batches. Knows no model."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps


def square(image: Image.Image) -> Image.Image:
    """The image in the middle of a black square: CLIP's centre crop would cut off its sides, a resize distort it."""
    return ImageOps.pad(image, (max(image.size), max(image.size)))


@torch.inference_mode()
def embed(items: Sequence, features: Callable[[list], torch.Tensor], width: int, batch_size: int) -> np.ndarray:
    """Unit vectors float32 [M, width] of what `features` makes of at most `batch_size` items at a time; M may be 0."""
    vectors = [torch.zeros(0, width)]
    for start in range(0, len(items), batch_size):
        vectors.append(features(list(items[start : start + batch_size])).float().cpu())
    return torch.nn.functional.normalize(torch.cat(vectors), dim=-1).numpy()
