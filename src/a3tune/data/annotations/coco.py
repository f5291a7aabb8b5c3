"""COCO JSON -> the regions of each image: run-length codes, polygons, boxes. Opens no image."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from a3tune.data.annotations.shapes import Annotated, box_region, image_size, numbers, polygon_region
from a3tune.errors import DataError, LabelError, shown
from a3tune.masks import area, decode_mask, encode_mask
from a3tune.types import Region, Rle


def read_coco(where: str, data: dict[str, Any], say: Callable[[str], None]) -> list[Annotated]:
    """What a COCO detection file says, image by image; images without annotations are left out.

    An image or annotation that is damaged, or belongs to nothing in the file, is left out and said.

    Raises:
        DataError: the file is no COCO as a whole.
    """
    names = {_field(where, item, "id"): str(_field(where, item, "name")) for item in _items(where, data, "categories")}
    images: dict[Any, Annotated] = {}
    for number, item in enumerate(_items(where, data, "images")):
        here = f"{where}: images[{number}]"
        try:
            size = image_size(here, item.get("height"), item.get("width"))
            images[_field(here, item, "id")] = Annotated(str(_field(here, item, "file_name")), size, ())
        except DataError as error:
            say(str(error))
    regions: dict[Any, list[Region]] = {}
    for number, item in enumerate(_items(where, data, "annotations")):
        here = f"{where}: annotations[{number}]"
        try:
            key, category = _field(here, item, "image_id"), _field(here, item, "category_id")
            if key not in images or category not in names:
                raise DataError(
                    f"{here}: expected an image and a category of this file, "
                    f"got {shown(key, 40)} and {shown(category, 40)}"
                )
            regions.setdefault(key, []).append(_region(here, item, images[key].size, names[category], say))
        except DataError as error:
            say(str(error))
    return [replace(images[key], regions=tuple(of_image)) for key, of_image in regions.items() if of_image]


def _region(where: str, item: dict[str, Any], size: tuple[int, int], name: str, say: Callable[[str], None]) -> Region:
    shape = item.get("segmentation")
    if isinstance(shape, dict):
        code = _rle(where, shape, size)
        if not area(code):
            raise DataError(f"{where}: segmentation: expected a mask of something, it covers no pixel")
        return Region(mask=code, name=name)
    if isinstance(shape, list) and shape:
        flat = [numbers(f"{where}: segmentation", polygon) for polygon in shape]
        if any(len(polygon) % 2 for polygon in flat):
            raise DataError(f"{where}: segmentation: expected pairs x, y, got an odd count of numbers")
        return polygon_region(f"{where}: segmentation", [polygon.reshape(-1, 2) for polygon in flat], size, name, say)
    x, y, width, height = numbers(f"{where}: bbox", item.get("bbox"), 4)
    return box_region(f"{where}: bbox", np.array([x, y, x + width, y + height]), size, name)


def _rle(where: str, shape: dict[str, Any], size: tuple[int, int]) -> Rle:
    height, width = size
    if shape.get("size") != [height, width]:
        raise DataError(
            f"{where}: segmentation.size: expected [{height}, {width}] as its image, got {shown(shape.get('size'), 40)}"
        )
    counts = shape.get("counts")
    if isinstance(counts, str):
        try:
            decode_mask(Rle(size, counts))
        except LabelError as error:
            raise DataError(f"{where}: segmentation: {error}") from None
        return Rle(size, counts)
    runs = numbers(f"{where}: segmentation.counts", counts)
    if (runs < 0).any() or (runs % 1).any() or runs.sum() != height * width:
        raise DataError(f"{where}: segmentation.counts: expected runs that sum to {height * width} pixels")
    return encode_mask(np.repeat(np.arange(len(runs)) % 2 == 1, runs.astype(np.int64)).reshape(width, height).T)


def _items(where: str, data: dict[str, Any], field: str) -> list[dict[str, Any]]:
    items = data.get(field)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise DataError(f"{where}: {field}: expected a list of objects as COCO has them, got {shown(items)}")
    return items


def _field(where: str, item: dict[str, Any], field: str) -> Any:
    value = item.get(field)
    if type(value) not in (int, str):
        raise DataError(f"{where}: {field}: expected a number or a text, got {shown(value)}")
    return value
