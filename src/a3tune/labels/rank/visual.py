"""How a segment is shown to a ranker. Knows pictures, no model.

A new visual prompt is a function and a line in `VISUAL_PROMPTS`.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

LONGEST_SIDE = 512
"""Most pixels of a visual prompt's longer side: rankers look at 224 to 448 pixels, scans can have thousands."""
_CONTEXT = 0.5
"""Margin of `expand` on each side, as a share of the segment's box."""
_DIMMED = 0.35
"""Brightness that `dim` leaves outside the segment."""
_GREY_CONTRAST = 0.5
"""Contrast that `grey` leaves outside the segment."""
_RED = (255, 0, 0)

VisualPrompt = Callable[[Image.Image, np.ndarray], Image.Image]
"""(RGB image, mask bool [H, W] of a segment that is not empty) -> RGB image, reduced to `LONGEST_SIDE`."""


def crop(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The segment's box, black outside the segment (as published)."""
    picture, inside = _reduced(*_cut(image, mask, context=0.0))
    return Image.composite(picture, Image.new("RGB", picture.size), inside)


def expand(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The segment's box and half as much again on each side, nothing hidden."""
    return _reduced(*_cut(image, mask, context=_CONTEXT))[0]


def box(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The whole image with the segment's box drawn in red."""
    picture, inside = _reduced(image, mask)
    left, top, right, bottom = inside.getbbox() or (0, 0, 1, 1)
    ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), outline=_RED, width=_line(picture))
    return picture


def blur(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The whole image, blurred outside the segment."""
    picture, inside = _reduced(image, mask)
    return Image.composite(picture, picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 40)), inside)


def dim(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The whole image, at 35 % of its brightness outside the segment: the segment keeps its place in the body."""
    picture, inside = _reduced(image, mask)
    return Image.composite(picture, picture.point([round(_DIMMED * value) for value in range(256)] * 3), inside)


def grey(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The whole image, grey and of little contrast outside the segment: its own colours stay inside."""
    picture, inside = _reduced(image, mask)
    flat = Image.blend(Image.new("L", picture.size, 128), ImageOps.grayscale(picture), _GREY_CONTRAST)
    return Image.composite(picture, flat.convert("RGB"), inside)


def contour(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The whole image with a red line around the segment, outside of it."""
    from scipy import ndimage

    picture, inside = _reduced(image, mask)
    within = np.asarray(inside) >= 128
    around = np.asarray(ndimage.binary_dilation(within, iterations=_line(picture)), bool) & ~within
    picture.paste(_RED, mask=Image.fromarray(around.astype(np.uint8) * 255))
    return picture


VISUAL_PROMPTS: dict[str, VisualPrompt] = {
    show.__name__: show for show in (crop, expand, box, blur, dim, grey, contour)
}
"""Name -> how a segment is shown to the ranker."""


def _cut(image: Image.Image, mask: np.ndarray, context: float) -> tuple[Image.Image, np.ndarray]:
    """Image and mask within the mask's box, widened by `context` times its sides as far as the image goes."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    extra_y, extra_x = round(context * (bottom - top)), round(context * (right - left))
    top, bottom = max(0, top - extra_y), min(mask.shape[0], bottom + extra_y)
    left, right = max(0, left - extra_x), min(mask.shape[1], right + extra_x)
    return image.crop((left, top, right, bottom)), mask[top:bottom, left:right]


def _reduced(image: Image.Image, mask: np.ndarray) -> tuple[Image.Image, Image.Image]:
    """A copy of the image and its mask (mode L, 255 inside) with the longer side at `LONGEST_SIDE` at most."""
    scale = min(1, LONGEST_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if size == image.size:
        return image.copy(), Image.fromarray(mask.astype(np.uint8) * 255)
    inside = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
    return image.resize(size, Image.Resampling.BOX), inside


def _line(picture: Image.Image) -> int:
    """Width of a line that is seen at the size rankers look at."""
    return max(1, max(picture.size) // 120)
