"""How a segment is shown to a ranker. Knows pictures, no model.

A new visual prompt is a function and a line in `VISUAL_PROMPTS`.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial, update_wrapper

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


class OfWholeImage:
    """A visual prompt that keeps the whole image: what the segments of an image share is made once.

    `prepare` takes the reduced image, of mode L if it has no colours, and gives a function of where a segment is (mode
    L, 255 inside).
    """

    def __init__(self, prepare: Callable[[Image.Image], Callable[[Image.Image], Image.Image]]):
        self._prepare = prepare
        update_wrapper(self, prepare)

    def __call__(self, image: Image.Image, mask: np.ndarray) -> Image.Image:
        return next(self.each(image, [mask])).convert("RGB")

    def each(self, image: Image.Image, masks: Iterable[np.ndarray]) -> Iterator[Image.Image]:
        """A picture for each of the masks, RGB or L: of three alike channels one is a third of the work."""
        size = _reduced_size(image)
        picture = _resized(image, size)
        show = self._prepare(picture.getchannel(0) if is_grey(picture) else picture)
        for mask in masks:
            yield show(_resized(_inside(mask), size))


@OfWholeImage
def box(picture: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """The whole image with the segment's box drawn in red."""

    def show(inside: Image.Image) -> Image.Image:
        shown = picture.convert("RGB")
        left, top, right, bottom = inside.getbbox() or (0, 0, 1, 1)
        ImageDraw.Draw(shown).rectangle((left, top, right - 1, bottom - 1), outline=_RED, width=_line(shown))
        return shown

    return show


@OfWholeImage
def blur(picture: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """The whole image, blurred outside the segment."""
    return partial(Image.composite, picture, picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 40)))


@OfWholeImage
def dim(picture: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """The whole image, at 35 % of its brightness outside the segment: the segment keeps its place in the body."""
    table = [round(_DIMMED * value) for value in range(256)]
    return partial(Image.composite, picture, picture.point(table * len(picture.getbands())))


@OfWholeImage
def grey(picture: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """The whole image, grey and of little contrast outside the segment: its own colours stay inside."""
    flat = Image.blend(Image.new("L", picture.size, 128), ImageOps.grayscale(picture), _GREY_CONTRAST)
    return partial(Image.composite, picture, flat.convert(picture.mode))


@OfWholeImage
def contour(picture: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """The whole image with a red line around the segment, outside of it."""
    from scipy import ndimage

    def show(inside: Image.Image) -> Image.Image:
        shown, within = picture.convert("RGB"), np.asarray(inside) >= 128
        around = np.asarray(ndimage.binary_dilation(within, iterations=_line(shown)), bool) & ~within
        shown.paste(_RED, mask=_inside(around))
        return shown

    return show


VISUAL_PROMPTS: dict[str, VisualPrompt] = {
    "crop": crop,
    "expand": expand,
    "box": box,
    "blur": blur,
    "dim": dim,
    "grey": grey,
    "contour": contour,
}
"""Name -> how a segment is shown to the ranker."""


def show_each(name: str, image: Image.Image, masks: Iterable[np.ndarray]) -> list[Image.Image]:
    """The visual prompts of an RGB image's segments, by the name of the way in `VISUAL_PROMPTS`; RGB or L."""
    show = VISUAL_PROMPTS[name]
    return list(show.each(image, masks) if isinstance(show, OfWholeImage) else (show(image, mask) for mask in masks))


def is_grey(image: Image.Image) -> bool:
    """Whether an RGB image has no colours."""
    red, green, blue = image.split()
    return red.tobytes() == green.tobytes() == blue.tobytes()


def _cut(image: Image.Image, mask: np.ndarray, context: float) -> tuple[Image.Image, np.ndarray]:
    """Image and mask within the mask's box, widened by `context` times its sides as far as the image goes."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    extra_y, extra_x = round(context * (bottom - top)), round(context * (right - left))
    top, bottom = max(0, top - extra_y), min(mask.shape[0], bottom + extra_y)
    left, right = max(0, left - extra_x), min(mask.shape[1], right + extra_x)
    return image.crop((left, top, right, bottom)), mask[top:bottom, left:right]


def _reduced(image: Image.Image, mask: np.ndarray) -> tuple[Image.Image, Image.Image]:
    """An image and its mask (mode L, 255 inside) with the longer side at `LONGEST_SIDE` at most."""
    size = _reduced_size(image)
    return _resized(image, size), _resized(_inside(mask), size)


def _reduced_size(image: Image.Image) -> tuple[int, int]:
    scale = min(1, LONGEST_SIDE / max(image.size))
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BOX)


def _inside(mask: np.ndarray) -> Image.Image:
    """Mode L, 255 inside. A decoded mask lies column by column, which Pillow turns faster than NumPy."""
    if mask.flags.f_contiguous:
        return Image.fromarray(mask.T.view(np.uint8) * 255).transpose(Image.Transpose.TRANSPOSE)
    return Image.fromarray(mask.astype(np.uint8) * 255)


def _line(picture: Image.Image) -> int:
    """Width of a line that is seen at the size rankers look at."""
    return max(1, max(picture.size) // 120)
