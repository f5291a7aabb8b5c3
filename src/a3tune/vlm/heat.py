"""Attention -> colours over a scan. Knows pixels; neither models nor pages."""

import numpy as np
from PIL import Image

_COLOURS = "inferno"
"""Perceptually uniform, and brighter means more in a grey print too."""
_OPACITY = 0.88


def heat_colours(heat: np.ndarray) -> np.ndarray:
    """Attention float [H, W] >= 0 as RGBA uint8 [H, W, 4], divided by its own largest value.

    Colour and opacity rise together: where nothing is looked at the scan stays as it is.
    """
    from matplotlib import colormaps  # slow, and most who load a model draw nothing

    scaled = heat / (heat.max() or 1.0)
    rgba = np.asarray(colormaps[_COLOURS](0.25 + 0.75 * scaled))
    rgba[..., 3] = _OPACITY * scaled**0.75
    return (255 * rgba).round().astype(np.uint8)


def overlay(image: np.ndarray, heat: np.ndarray) -> Image.Image:
    """A scan, uint8 [H, W] or [H, W, 3], under its attention, float [H, W] >= 0: the picture that `ask` writes."""
    scan = Image.fromarray(image).convert("RGBA")
    return Image.alpha_composite(scan, Image.fromarray(heat_colours(heat))).convert("RGB")
