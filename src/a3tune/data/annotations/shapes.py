"""Shapes that annotation tools draw -> regions in image pixels, and what an annotation says of one image."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco

from a3tune.data.window import check_size
from a3tune.errors import DataError, shown
from a3tune.types import Region, Rle

MAX_OUTLINE = 2_000_000
"""Longest outline of one region in pixels; filling takes some 100 bytes for each of them."""


@dataclass(frozen=True, slots=True)
class Annotated:
    """The regions that an annotation has of one image."""

    image: str
    """The image's file name as the annotation gives it."""
    size: tuple[int, int]
    """Height and width of the image that was annotated, in pixels."""
    regions: tuple[Region, ...]


def image_size(where: str, height: object, width: object) -> tuple[int, int]:
    """Height and width in pixels, as ints.

    Raises:
        DataError: they are no positive numbers, or too large to decode.
    """
    if not all(type(side) is int and side > 0 for side in (height, width)):
        raise DataError(
            f"{where}: expected the image's height and width in pixels, got {shown(height, 20)} and {shown(width, 20)}"
        )
    assert isinstance(height, int) and isinstance(width, int)
    check_size(width, height)
    return height, width


def numbers(where: str, values: Any, count: int | None = None) -> np.ndarray:
    """A list of finite numbers as float64 [count].

    Raises:
        DataError: it is no such list.
    """
    fits = isinstance(values, list) and all(type(item) in (int, float) and abs(item) < 2**53 for item in values)
    if not fits or (count is not None and len(values) != count):
        wanted = "" if count is None else f"{count} "
        raise DataError(f"{where}: expected a list of {wanted}finite numbers, got {shown(values)}")
    return np.asarray(values, dtype=np.float64)


def box_region(where: str, corners: np.ndarray, size: tuple[int, int], name: str) -> Region:
    """The region of a box (x0, y0, x1, y1) in pixels; what lies outside the image is cut off.

    Raises:
        DataError: nothing of the box is inside the image.
    """
    height, width = size
    # Corners in percent come back a hair too large, and a box covers every pixel that it touches.
    x0, y0, x1, y1 = (float(item) for item in np.clip(np.round(corners, 6), 0, (width, height, width, height)))
    if not (x0 < x1 and y0 < y1):
        raise DataError(
            f"{where}: expected a box inside the image of {width} x {height} pixels, got {corners.tolist()}"
        )
    return Region(box=(x0, y0, x1, y1), name=name)


def polygon_region(
    where: str, polygons: Iterable[np.ndarray], size: tuple[int, int], name: str, say: Callable[[str], None]
) -> Region:
    """The region of polygons [N, 2] of (x, y) in pixels, filled as COCO fills them; corners are moved into the image.

    One of fewer than three corners is left out and said.

    Raises:
        DataError: no polygon has three corners, or they cover no pixel.
    """
    height, width = size
    flat: list[list[float]] = []
    short: list[str] = []
    length = 0.0
    for polygon in polygons:
        if len(polygon) < 3:
            short.append(f"{where}: expected polygons of at least three corners, got {len(polygon)}")
            continue
        # pycocotools walks along every edge: a corner far outside would cost memory without end.
        corners = np.clip(polygon, 0, (width, height))
        length += float(np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum())
        flat.append(corners.ravel().tolist())
    if not flat:
        raise DataError(short[0] if short else f"{where}: expected at least one polygon, got none")
    if length > MAX_OUTLINE:
        raise DataError(f"{where}: expected an outline of at most {MAX_OUTLINE:,} pixels, got {length:,.0f}")
    codes: Any = flat
    merged: Any = coco.merge(coco.frPyObjects(codes, height, width))
    if not coco.area(merged):
        raise DataError(f"{where}: expected polygons that cover some of the image, they cover no pixel")
    for line in short:
        say(line)
    return Region(mask=Rle(size, merged["counts"].decode("ascii")), name=name)
