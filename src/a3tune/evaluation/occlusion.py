"""Hiding parts of an image: which pixels, and what stands in their place. Knows pixels; no model and no question."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from a3tune.types import Filling, Part

Pixels = NDArray[np.uint8]
"""uint8 `[H, W, 3]`."""
Mask = NDArray[np.bool_]
"""bool `[H, W]`."""
Fill = Callable[[Pixels, Mask, np.random.Generator], NDArray]
"""(image, hidden pixels, random numbers) -> what those pixels become, `[hidden, 3]` or `[3]`."""

BLUR = 0.05
"""Standard deviation of the blur, in lengths of the image's longer side: 11 pixels of 224, 10 in Fong and Vedaldi."""
_SEARCHED = 512
"""Longest side at which a place elsewhere is searched; larger images are searched in whole blocks of pixels."""


def mean(image: Pixels, hidden: Mask, random: np.random.Generator) -> NDArray:
    """The mean colour of the image (as the grey square of Zeiler and Fergus, 2014)."""
    return image.mean((0, 1)).round()


def blur(image: Pixels, hidden: Mask, random: np.random.Generator) -> NDArray:
    """The image behind a Gaussian blur (Fong and Vedaldi, 2017), which Pillow makes of three box blurs."""
    radius = BLUR * max(hidden.shape)
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))[hidden]


def noise(image: Pixels, hidden: Mask, random: np.random.Generator) -> NDArray:
    """Pixels drawn from the whole image, each alone and with replacement: its colours without its structure."""
    return image.reshape(-1, 3)[random.integers(hidden.size, size=int(hidden.sum()))]


FILLINGS: dict[Filling, Fill] = {"mean": mean, "blur": blur, "noise": noise}


def occlude(image: Image.Image, hidden: Mask, filling: Filling, seed: int = 0) -> Image.Image:
    """An RGB image with some of its pixels replaced; the same seed gives the same noise."""
    pixels = np.array(image, dtype=np.uint8)
    pixels[hidden] = FILLINGS[filling](np.asarray(image), hidden, np.random.default_rng(seed))
    return Image.fromarray(pixels)


def hidden_parts(image: Image.Image, region: Mask, dilation: float = 0.0) -> dict[Part, Mask]:
    """What is hidden of an RGB image, by part; without `elsewhere` where there is no such place.

    Args:
        region: where the answer is to be found, not empty.
        dilation: how far around the region counts as the region, in lengths of the image's longer side.
    """
    inside = dilate(region, dilation * max(region.shape))
    parts: dict[Part, Mask] = {"inside": inside, "outside": ~inside}
    place = elsewhere(np.asarray(image), inside)
    return parts if place is None else {**parts, "elsewhere": place}


def dilate(mask: Mask, radius: float) -> Mask:
    """The mask with every pixel whose centre is at most `radius` pixels from the centre of one in it."""
    from scipy.ndimage import distance_transform_edt  # slow to import

    return mask if radius < 1 else np.asarray(distance_transform_edt(~mask)) <= radius


def elsewhere(image: Pixels, mask: Mask) -> Mask | None:
    """The mask moved to where it shares no pixel with itself, over the edges and in again; None if nowhere is free.

    Of all free places it is the one whose mean and spread of grey values are nearest to those under the mask: hiding
    the empty margin of a scan would be no control. Images larger than `_SEARCHED` are searched in steps of whole
    blocks, the last of which may stand out over the edge: a place where pixels of the mask would be lost is not free.
    """
    block = -(-max(mask.shape) // _SEARCHED)
    padding = [(0, -side % block) for side in mask.shape]
    padded, grey = np.pad(mask, padding), np.pad(image.mean(-1, dtype=np.float32), padding, mode="edge")
    blocks = (padded.shape[0] // block, block, padded.shape[1] // block, block)
    coarse, shades = padded.reshape(blocks).max((1, 3)), grey.reshape(blocks).mean((1, 3))
    free = _sums_under(coarse, coarse.astype(float)).round() == 0
    down_kept, right_kept = (_kept(np.asarray(padded.any(1 - axis)), mask.shape[axis], block) for axis in (0, 1))
    free &= down_kept[:, None] & right_kept
    if not free.any():
        return None
    # Grey values about zero: of large ones the variance would be lost in rounding.
    shades -= shades.mean()
    area = coarse.sum()
    level = _sums_under(coarse, shades) / area
    spread = np.sqrt((_sums_under(coarse, shades**2) / area - level**2).clip(0))
    unlike = np.where(free, np.hypot(level - level[0, 0], spread - spread[0, 0]), np.inf)
    down, right = np.unravel_index(unlike.argmin(), unlike.shape)
    return np.roll(padded, (int(down) * block, int(right) * block), (0, 1))[: mask.shape[0], : mask.shape[1]]


def _kept(used: NDArray[np.bool_], length: int, block: int) -> NDArray[np.bool_]:
    """Which moves along an axis, by 0, 1, ... blocks and round, bring none of the lines `used` beyond `length`."""
    beyond = np.arange(length, len(used)) - np.arange(0, len(used), block)[:, None]
    return np.logical_not(used[beyond % len(used)].any(1))


def _sums_under(mask: Mask, values: NDArray) -> NDArray:
    """float `[H, W]`: at (y, x) the sum of `values` under the mask moved down by y and right by x, over the edges."""
    product = np.fft.rfft2(values) * np.fft.rfft2(mask.astype(float)).conj()
    return np.fft.irfft2(product, mask.shape)
