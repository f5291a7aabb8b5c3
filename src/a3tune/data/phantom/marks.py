"""What hospitals leave on scans beside the patient: tags, tubes, letters. Knows pictures and places, no question.

In real archives such marks go along with diagnoses (portable scanners stand on wards, drains in those who are treated),
and are easier to read than a lesion. Here a mark is one of `CODES` of its kind, and the data set decides what it names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from a3tune.data.phantom.scan import SIZE, Scan

MarkKind = Literal["tag", "tube", "letters"]
CORNERS = ("upper left", "upper right", "lower left", "lower right")
CODES: dict[MarkKind, tuple[str, ...]] = {"tag": CORNERS, "tube": CORNERS, "letters": ("L", "R", "AP", "PORT")}
"""Four marks of each kind: a tag and a tube differ by the corner they are in or come from, letters by what they say,
too: a tiny model does not read them as easily as it sees where they are."""
KIND_OF_BODY: dict[str, MarkKind] = {"chest": "tube", "abdomen": "tag", "brain": "letters"}
_WHITE = 255
_TAG = 9
"""Side of a tag in pixels; a third of it is its dark centre."""
_ROOM = 3
"""Pixels by which a mark's distance from the edge varies. A tag stays within one image token of the tiny model:
otherwise it is no easier to read than a lesion."""
_TUBE = (30, 46)
"""Least and most pixels that a tube reaches into the image."""
_FONT = {
    "A": ("01110", "10001", "10001", "11111", "10001", "10001", "10001"),
    "L": ("10000", "10000", "10000", "10000", "10000", "10000", "11111"),
    "O": ("01110", "10001", "10001", "10001", "10001", "10001", "01110"),
    "P": ("11110", "10001", "10001", "11110", "10000", "10000", "10000"),
    "R": ("11110", "10001", "10001", "11110", "10100", "10010", "10001"),
    "T": ("11111", "00100", "00100", "00100", "00100", "00100", "00100"),
}


@dataclass(frozen=True, slots=True)
class Mark:
    """One of the four marks of a kind."""

    kind: MarkKind
    code: int
    """Which of `CODES[kind]`."""

    @property
    def name(self) -> str:
        return f"{self.kind} {CODES[self.kind][self.code]}"


def draw_mark(scan: Scan, mark: Mark, rng: np.random.Generator) -> np.ndarray:
    """The scan's picture with the mark on it, uint8 [SIZE, SIZE]. A mark never covers a lesion."""
    grey, drawn = _DRAW[mark.kind](mark.code, rng)
    for lesion in scan.lesions:
        drawn = drawn & ~lesion.mask
    return np.where(drawn, grey, scan.image).astype(np.uint8)


def _tag(code: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A white square with a dark centre."""
    third = _TAG // 3
    tag = np.full((_TAG, _TAG), _WHITE)
    tag[third:-third, third:-third] = 0
    return _put(tag, code, rng)


def _letters(code: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """White letters on black, each text in a corner of its own."""
    glyphs = [np.array([[int(dot) for dot in row] for row in _FONT[letter]]) for letter in CODES["letters"][code]]
    line = np.concatenate([np.pad(glyph, 1) for glyph in glyphs], axis=1)
    return _put(_WHITE * line.repeat(2, axis=0).repeat(2, axis=1), code, rng)


def _put(picture: np.ndarray, corner: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A small picture near a corner of the image."""
    grey, drawn = np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE), bool)
    height, width = picture.shape
    y, x = rng.integers(1, 1 + _ROOM, 2)
    rows = slice(SIZE - height - y, SIZE - y) if corner >= 2 else slice(y, y + height)
    columns = slice(SIZE - width - x, SIZE - x) if corner % 2 else slice(x, x + width)
    grey[rows, columns], drawn[rows, columns] = picture, True
    return grey, drawn


def _tube(code: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A bright bent line of two pixels that comes from the upper or lower edge, left or right."""
    reach, start = rng.uniform(*_TUBE), rng.uniform(0.06, 0.16) * SIZE
    bend, end = start + rng.uniform(-4, 4), start + rng.uniform(0, 14)
    t = np.linspace(0, 1, 4 * SIZE)
    y = reach * t
    x = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
    if code >= 2:
        y = SIZE - 1 - y
    if code % 2:
        x = SIZE - 1 - x
    drawn = np.zeros((SIZE, SIZE), bool)
    for wide in (0, 1):
        drawn[y.round().astype(int), np.clip(x.round().astype(int) + wide, 0, SIZE - 1)] = True
    return np.full((SIZE, SIZE), _WHITE), drawn


_DRAW: dict[MarkKind, Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]] = {
    "tag": _tag,
    "tube": _tube,
    "letters": _letters,
}
"""(code, rng) -> grey values [SIZE, SIZE], and where they are drawn, bool [SIZE, SIZE]."""
