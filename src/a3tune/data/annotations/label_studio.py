"""Label Studio's JSON export -> the regions of each image: brush, rectangles, ellipses, polygons. Opens no image."""

import re
from collections import Counter
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
_PLACELESS = ("choices", "taxonomy", "textarea", "rating", "number", "datetime", "labels")
"""Results that say something of the image or of another result, and mean no place."""
_ELLIPSE = 128
"""Corners of the polygon that stands for an ellipse."""


def read_label_studio(where: str, tasks: list[Any], say: Callable[[str], None]) -> list[Annotated]:
    """What an export says, task by task; of several annotations of a task the first that was not cancelled counts.

    A shape that is damaged, and results that are no regions (points, relations), are left out and said.

    Raises:
        DataError: it is no list of tasks.
    """
    annotated: list[Annotated] = []
    others: Counter[str] = Counter()
    for number, task in enumerate(tasks):
        here = f"{where}: [{number}]"
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise DataError(f"{here}: expected a task with 'data' and 'annotations', got {shown(task)}")
        try:
            found = _task(here, task, others, say)
        except DataError as error:
            say(str(error))
        else:
            annotated += [found] if found else []
    for kind, count in others.items():
        say(f"{where}: {count} results of the type {shown(kind, 40)}, which are no regions")
    return annotated


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


def _task(where: str, task: dict[str, Any], others: Counter[str], say: Callable[[str], None]) -> Annotated | None:
    annotations = task.get("annotations") or []
    if not isinstance(annotations, list) or not all(isinstance(item, dict) for item in annotations):
        raise DataError(f"{where}: annotations: expected a list of objects, got {shown(annotations)}")
    results = next((item.get("result") for item in annotations if not item.get("was_cancelled")), [])
    if not isinstance(results, list) or not all(isinstance(item, dict) for item in results):
        raise DataError(f"{where}: annotations: expected a list of results, got {shown(results)}")
    names = {item["id"]: item["value"] for item in results if item.get("type") == "labels" and _has_name(item)}
    regions: list[Region] = []
    size: tuple[int, int] | None = None
    for number, result in enumerate(results):
        kind, here = str(result.get("type")), f"{where}: result[{number}]"
        if kind not in _SHAPES:
            others.update([kind] if kind not in _PLACELESS else [])
            continue
        try:
            region_size = image_size(here, result.get("original_height"), result.get("original_width"))
            if size not in (None, region_size):
                raise DataError(f"{here}: expected an image of the size of the first result, got another")
            regions.append(_region(here, result, region_size, names, say))
            size = region_size
        except DataError as error:
            say(str(error))
    return Annotated(_image_name(where, task), size, tuple(regions)) if size else None


def _has_name(result: dict[str, Any]) -> bool:
    return isinstance(result.get("id"), str) and isinstance(result.get("value"), dict)


def _region(
    where: str, result: dict[str, Any], size: tuple[int, int], names: dict[str, Any], say: Callable[[str], None]
) -> Region:
    kind, value = str(result["type"]), result.get("value")
    if not isinstance(value, dict):
        raise DataError(f"{where}: value: expected an object, got {shown(value)}")
    if result.get("image_rotation"):
        raise DataError(f"{where}: drawn while the image was turned: turn it back in Label Studio, and export again")
    # A shape may have its name in a result of its own, with the same id.
    beside = names.get(result["id"], {}) if isinstance(result.get("id"), str) else {}
    found = value.get(kind) or value.get("labels") or beside.get("labels") or [""]
    if not isinstance(found, list):
        raise DataError(f"{where}: {kind}: expected a list of names, got {shown(found)}")
    return _SHAPES[kind](where, value, size, str(found[0]), say)


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
    name = local[0] if local else unquote(parts.path)
    if local or parts.scheme or name.startswith("/"):
        folder, _, last = name.rpartition("/")
        return f"/{folder.lstrip('/')}/{_UPLOAD.sub('', last)}"
    return name


def _brush(where: str, value: dict[str, Any], size: tuple[int, int], name: str, say: Callable[[str], None]) -> Region:
    codes = value.get("rle")
    if not isinstance(codes, list) or not all(type(code) is int and 0 <= code < 256 for code in codes):
        raise DataError(f"{where}: rle: expected a list of bytes, got {shown(codes)}")
    try:
        mask = decode_brush(codes, *size)
    except DataError as error:
        raise DataError(f"{where}: rle: {error}") from None
    if not mask.any():
        raise DataError(f"{where}: rle: expected a mask of something, it covers no pixel")
    return Region(mask=encode_mask(mask), name=name)


def _rectangle(
    where: str, value: dict[str, Any], size: tuple[int, int], name: str, say: Callable[[str], None]
) -> Region:
    sides = [value.get(key) for key in ("x", "y", "width", "height")]
    x, y, width, height = numbers(where, sides, 4) * (size[1], size[0], size[1], size[0]) / 100
    if width <= 0 or height <= 0:
        raise DataError(f"{where}: expected a rectangle of some width and height, got {width:g} x {height:g} pixels")
    turn = _turn(where, value)
    if not turn:
        return box_region(where, np.array([x, y, x + width, y + height]), size, name)
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    # About the corner at the upper left.
    return polygon_region(where, [_turned(corners, turn) + np.array([x, y])], size, name, say)


def _ellipse(where: str, value: dict[str, Any], size: tuple[int, int], name: str, say: Callable[[str], None]) -> Region:
    sides = [value.get(key) for key in ("x", "y", "radiusX", "radiusY")]
    x, y, across, down = numbers(where, sides, 4) * (size[1], size[0], size[1], size[0]) / 100
    if across <= 0 or down <= 0:
        raise DataError(f"{where}: expected an ellipse of some width and height, got the radii {across:g} and {down:g}")
    angles = np.linspace(0, 2 * np.pi, _ELLIPSE, endpoint=False)
    outline = np.stack([across * np.cos(angles), down * np.sin(angles)], axis=1)
    return polygon_region(where, [_turned(outline, _turn(where, value)) + np.array([x, y])], size, name, say)


def _turn(where: str, value: dict[str, Any]) -> float:
    return float(np.deg2rad(numbers(f"{where}: rotation", [value.get("rotation") or 0], 1)[0]))


def _turned(points: np.ndarray, turn: float) -> np.ndarray:
    """Points [N, 2] turned clockwise on the screen."""
    return points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])


def _polygon(where: str, value: dict[str, Any], size: tuple[int, int], name: str, say: Callable[[str], None]) -> Region:
    points = value.get("points")
    if not isinstance(points, list):
        raise DataError(f"{where}: points: expected a list of [x, y] in percent, got {shown(points)}")
    corners = np.array([numbers(f"{where}: points", point, 2) for point in points]).reshape(-1, 2)
    return polygon_region(where, [corners * (size[1], size[0]) / 100], size, name, say)


_SHAPES: dict[str, Callable[[str, dict[str, Any], tuple[int, int], str, Callable[[str], None]], Region]] = {
    f"{kind}{end}": shape
    for kind, shape in (("brush", _brush), ("rectangle", _rectangle), ("ellipse", _ellipse), ("polygon", _polygon))
    for end in ("labels", "")
}
