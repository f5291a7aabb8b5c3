"""Label Studio's JSON export -> the regions of each image: brush strokes, rectangles, polygons. Opens no image."""

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from a3tune.data.annotations.shapes import Annotated, box_region, image_size, numbers, polygon_region
from a3tune.errors import DataError, shown
from a3tune.masks import encode_mask
from a3tune.types import Region

_UPLOAD = re.compile(r"^[0-9a-f]{8}-")
"""What Label Studio puts before the name of an uploaded file."""


def read_label_studio(where: str, tasks: list[Any]) -> list[Annotated]:
    """What an export says, task by task; of several annotations of a task the first that was not cancelled counts.

    Raises:
        DataError: a task is damaged, or holds a shape of another kind.
    """
    annotated = [_task(f"{where}: [{number}]", task) for number, task in enumerate(tasks)]
    return [item for item in annotated if item is not None]


def decode_brush(codes: list[int], height: int, width: int) -> np.ndarray:
    """Mask bool [H, W] of Label Studio's brush code: what is not fully transparent.

    The code holds RGBA bytes, row by row: 32 bits say how many, 5 the word size less one, 4 x 4 the bits of a run's
    length less one, by class; then, until all are there, a bit (1: one word repeated, 0: words as they are), 2 bits of
    class, the length less one, and the word or words.

    Raises:
        DataError: the code ends early, or is not of an image of this size.
    """
    bits = "".join(f"{code:08b}" for code in codes)
    position = 0

    def take(count: int) -> int:
        nonlocal position
        position += count
        if position > len(bits):
            raise DataError("expected a complete brush code, it ends early")
        return int(bits[position - count : position], 2)

    total, word_size = take(32), take(5) + 1
    length_sizes = [take(4) + 1 for _ in range(4)]
    if total != 4 * height * width:
        raise DataError(f"expected a brush code of {width} x {height} pixels, got one of {total // 4:,} pixels")
    seen = np.zeros(total, dtype=bool)
    at = 0
    while at < total:
        repeated = take(1)
        end = at + 1 + take(length_sizes[take(2)])
        if end > total:
            raise DataError("expected runs that end with the image, one goes on")
        seen[at:end] = take(word_size) > 0 if repeated else [take(word_size) > 0 for _ in range(at, end)]
        at = end
    return seen.reshape(height, width, 4)[..., 3]


def _task(where: str, task: Any) -> Annotated | None:
    if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
        raise DataError(f"{where}: expected a task with 'data' and 'annotations', got {shown(task)}")
    annotations = task.get("annotations") or []
    if not isinstance(annotations, list) or not all(isinstance(item, dict) for item in annotations):
        raise DataError(f"{where}: annotations: expected a list of objects, got {shown(annotations)}")
    results = next((item.get("result") for item in annotations if not item.get("was_cancelled")), [])
    if not isinstance(results, list) or not all(isinstance(item, dict) for item in results):
        raise DataError(f"{where}: annotations: expected a list of results, got {shown(results)}")
    regions: list[Region] = []
    size: tuple[int, int] | None = None
    for number, result in enumerate(results):
        kind = str(result.get("type"))
        if kind in ("choices", "textarea", "rating", "number"):
            continue
        here = f"{where}: result[{number}]"
        if kind not in _SHAPES:
            raise DataError(f"{here}: type: expected one of {', '.join(_SHAPES)}, got {shown(kind, 40)}")
        value = result.get("value")
        if not isinstance(value, dict):
            raise DataError(f"{here}: value: expected an object, got {shown(value)}")
        size = image_size(here, result.get("original_height"), result.get("original_width"))
        names = value.get(kind) or [""]
        if not isinstance(names, list):
            raise DataError(f"{here}: {kind}: expected a list of names, got {shown(names)}")
        regions.append(_SHAPES[kind](here, value, size, str(names[0])))
    return Annotated(_image_name(where, task), size, tuple(regions)) if size else None


def _image_name(where: str, task: dict[str, Any]) -> str:
    """The file of a task: what was uploaded, or what its address ends in (`/data/local-files/?d=folder/a.png`)."""
    upload = task.get("file_upload")
    texts = [value for value in task["data"].values() if isinstance(value, str)]
    address = task["data"].get("image", texts[0] if len(texts) == 1 else None)
    if isinstance(upload, str) and upload:
        return _UPLOAD.sub("", upload)
    if not isinstance(address, str) or not address:
        raise DataError(f"{where}: data.image: expected the image's address, got {shown(task['data'])}")
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise DataError(f"{where}: data.image: expected the image's address, got {shown(address)}: {error}") from None
    local = parse_qs(parts.query).get("d")
    if local:
        return local[0]
    name = unquote(parts.path)
    return _UPLOAD.sub("", name.rpartition("/")[2]) if parts.scheme or name.startswith("/") else name


def _brush(where: str, value: dict[str, Any], size: tuple[int, int], name: str) -> Region:
    codes = value.get("rle")
    if not isinstance(codes, list) or not all(type(code) is int and 0 <= code < 256 for code in codes):
        raise DataError(f"{where}: rle: expected a list of bytes, got {shown(codes)}")
    try:
        return Region(mask=encode_mask(decode_brush(codes, *size)), name=name)
    except DataError as error:
        raise DataError(f"{where}: rle: {error}") from None


def _rectangle(where: str, value: dict[str, Any], size: tuple[int, int], name: str) -> Region:
    sides = [value.get(key) for key in ("x", "y", "width", "height")]
    x, y, width, height = numbers(where, sides, 4) * (size[1], size[0], size[1], size[0]) / 100
    turn = np.deg2rad(numbers(f"{where}: rotation", [value.get("rotation") or 0], 1)[0])
    if not turn:
        return box_region(where, np.array([x, y, x + width, y + height]), size, name)
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    # Clockwise on the screen, about the corner at the upper left.
    turned = corners @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return polygon_region(where, [turned + np.array([x, y])], size, name)


def _polygon(where: str, value: dict[str, Any], size: tuple[int, int], name: str) -> Region:
    points = value.get("points")
    if not isinstance(points, list):
        raise DataError(f"{where}: points: expected a list of [x, y] in percent, got {shown(points)}")
    corners = np.array([numbers(f"{where}: points", point, 2) for point in points]).reshape(-1, 2)
    return polygon_region(where, [corners * (size[1], size[0]) / 100], size, name)


_SHAPES: dict[str, Callable[[str, dict[str, Any], tuple[int, int], str], Region]] = {
    "brushlabels": _brush,
    "rectanglelabels": _rectangle,
    "polygonlabels": _polygon,
    "brush": _brush,
    "rectangle": _rectangle,
    "polygon": _polygon,
}
