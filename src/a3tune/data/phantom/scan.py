"""Synthetic scans with exact regions: what an organ looks like, where its lesions are, and nothing about questions.

A scan is drawn in four steps: place a view's organs with anatomical variation, put lesions into them, give every
structure its brightness in the modality, add noise and artefacts. Masks are exact because the picture is drawn from
them. Every scan is a pure function of its seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from a3tune.data.phantom.anatomy import LESION_KINDS, MODALITIES, VIEWS, Organ, View

SIZE = 120
"""Side of a scan in pixels."""
Size = Literal["small", "large"]
_RADIUS: dict[Size, tuple[float, float]] = {"small": (3.4, 4.4), "large": (6.4, 7.8)}
_MARGIN = 0.5
"""Pixels of healthy tissue around a lesion."""
_LESIONS_PER_ORGAN = (0.42, 0.24, 0.18, 0.16)
"""Odds of none, one, two, three lesions in an organ."""


@dataclass(frozen=True, slots=True)
class Lesion:
    """One lesion inside one organ."""

    kind: str
    organ: str
    size: Size
    centre: tuple[float, float]
    """Row and column in pixels."""
    mask: np.ndarray
    """bool [SIZE, SIZE]."""


@dataclass(frozen=True, slots=True)
class Scan:
    """One synthetic image with everything that is true about it."""

    image: np.ndarray
    """uint8 [SIZE, SIZE]."""
    body: str
    plane: str
    modality: str
    organs: Mapping[str, np.ndarray]
    """Visible organs with their masks, bool [SIZE, SIZE], lesions included."""
    lesions: tuple[Lesion, ...]
    hosts: tuple[str, ...]
    """The organs that may carry lesions."""


def make_scan(seed: int | tuple[int, ...], view: View | None = None) -> Scan:
    """Draw the scan of a seed; `view` fixes body part and plane, otherwise they are drawn too."""
    rng = np.random.default_rng(seed)
    if view is None:
        view = VIEWS[rng.integers(len(VIEWS))]
    modality = MODALITIES[rng.integers(len(MODALITIES))]
    body, organs = _place_organs(view, rng)
    hosts = tuple(organ.name for organ in view.organs if organ.hosts_lesions and organ.name in organs)
    lesions = tuple(lesion for name in hosts for lesion in _place_lesions(name, organs[name], rng))
    picture = _paint(view, modality, body, organs, lesions, rng)
    picture = _degrade(picture, modality, rng)
    image = (255 * np.clip(picture, 0, 1)).round().astype(np.uint8)
    return Scan(image, view.body, view.plane, modality, organs, lesions, hosts)


def has_room(mask: np.ndarray, size: Size) -> bool:
    """Whether any lesion of that size fits into the mask, bool [SIZE, SIZE]."""
    return bool(_depth(mask).max() > _RADIUS[size][1] + _MARGIN)


def _depth(mask: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the outside of the mask; the image's edge counts as outside."""
    return np.asarray(ndimage.distance_transform_edt(np.pad(mask, 1)))[1:-1, 1:-1]


def _smooth_noise(rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Unit-variance Gaussian noise with a correlation length of `sigma` pixels, [SIZE, SIZE]."""
    noise = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), sigma, mode="wrap")
    return noise / noise.std()


def _ellipse(x: np.ndarray, y: np.ndarray, rx: float, ry: float, angle: float) -> np.ndarray:
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    return ((cos * x + sin * y) / rx) ** 2 + ((cos * y - sin * x) / ry) ** 2 <= 1


def _place_organs(view: View, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Masks of the body and of each organ after a random pose, a smooth deformation and a jitter of each organ."""
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5) / (SIZE / 2) - 1
    scale, turn = rng.uniform(0.80, 1.02), np.deg2rad(rng.normal(0, 5))
    shift_x, shift_y = rng.uniform(-0.10, 0.10, 2)
    x, y = (x - shift_x) / scale, (y - shift_y) / scale
    x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    x, y = x + 0.030 * _smooth_noise(rng, 11), y + 0.030 * _smooth_noise(rng, 11)
    body = _ellipse(x, y, *view.outline, 0)
    inside = _ellipse(x, y, view.outline[0] - 0.06, view.outline[1] - 0.06, 0)
    owner = np.full((SIZE, SIZE), -1)
    for index, organ in enumerate(view.organs):
        dx, dy = rng.normal(0, 0.035, 2)
        grow_x, grow_y = rng.uniform(0.85, 1.12, 2)
        angle = organ.angle + rng.normal(0, 8)
        owner[inside & _ellipse(x - organ.x - dx, y - organ.y - dy, organ.rx * grow_x, organ.ry * grow_y, angle)] = (
            index
        )
    return body, {organ.name: owner == index for index, organ in enumerate(view.organs) if (owner == index).any()}


def _place_lesions(organ: str, mask: np.ndarray, rng: np.random.Generator) -> list[Lesion]:
    """None to three lesions that lie inside the organ and do not touch each other."""
    lesions: list[Lesion] = []
    free = mask.copy()
    for _ in range(rng.choice(len(_LESIONS_PER_ORGAN), p=_LESIONS_PER_ORGAN)):
        kind = LESION_KINDS[rng.integers(len(LESION_KINDS))]
        size: Size = "small" if rng.random() < 0.5 or not has_room(free, "large") else "large"
        radius = rng.uniform(*_RADIUS[size])
        room = np.argwhere(_depth(free) > radius + _MARGIN)
        if not len(room):
            break
        row, column = room[rng.integers(len(room))] + rng.uniform(-0.5, 0.5, 2)
        outline = _lesion_mask(kind, row, column, radius, rng) & mask
        lesions.append(Lesion(kind, organ, size, (row, column), outline))
        free &= ~np.asarray(ndimage.binary_dilation(outline, iterations=4), bool)
    return lesions


def _lesion_mask(kind: str, row: float, column: float, radius: float, rng: np.random.Generator) -> np.ndarray:
    """A disc; a mass has a lobed outline."""
    y, x = np.mgrid[:SIZE, :SIZE]
    distance = np.hypot(y - row, x - column)
    if kind != "mass":
        return distance <= radius
    angle = np.arctan2(y - row, x - column)
    lobes = 1 + 0.16 * np.sin(rng.integers(4, 7) * angle + rng.uniform(0, 2 * np.pi))
    return distance <= radius * lobes


def _paint(
    view: View,
    modality: str,
    body: np.ndarray,
    organs: Mapping[str, np.ndarray],
    lesions: tuple[Lesion, ...],
    rng: np.random.Generator,
) -> np.ndarray:
    """Brightness of every pixel, 0..1, before noise."""

    def brightness(thing: Organ) -> float:
        return (thing.ct if modality == "CT" else thing.mri) + rng.normal(0, 0.025)

    picture = np.full((SIZE, SIZE), 0.01)
    picture[body] = view.tissue_ct if modality == "CT" else view.tissue_mri
    for organ in view.organs:
        if organ.name in organs:
            mask = organs[organ.name]
            picture[mask] = (brightness(organ) + organ.texture * _smooth_noise(rng, 1.5))[mask]
    picture = ndimage.gaussian_filter(picture, 0.6)
    for lesion in lesions:
        _paint_lesion(picture, lesion, rng)
    return picture


def _paint_lesion(picture: np.ndarray, lesion: Lesion, rng: np.random.Generator) -> None:
    """A cyst is dark with a thin rim, an abscess a thick bright ring, a mass bright, a calcification bright dots."""
    mask = lesion.mask
    depth = _depth(mask)
    strength = rng.uniform(0.85, 1.15)
    around = float(np.median(picture[ndimage.binary_dilation(mask, iterations=3) & ~mask]))
    bright, dark = min(1.0, around + 0.42 * strength), max(0.0, around - 0.30 * strength)
    if lesion.kind == "cyst":
        picture[mask] = dark
        picture[mask & (depth <= 1.0)] = min(1.0, around + 0.18)
    elif lesion.kind == "abscess":
        picture[mask] = dark
        picture[mask & (depth <= 0.45 * depth.max())] = bright
    elif lesion.kind == "mass":
        picture[mask] = (bright - 0.10 + 0.05 * _smooth_noise(rng, 1.0))[mask]
    else:
        picture[mask] = 0.5 * (picture[mask] + around)
        picture[mask & (_smooth_noise(rng, 0.9) > 0.55)] = min(1.0, around + 0.60 * strength)


def _degrade(picture: np.ndarray, modality: str, rng: np.random.Generator) -> np.ndarray:
    """Noise, and in some scans an artefact: streaks and rings in CT, shading and ghosts in MRI."""
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5) / (SIZE / 2) - 1
    noise = rng.uniform(0.012, 0.035)
    if modality == "CT":
        picture = picture + noise * _smooth_noise(rng, 0.5)
        if rng.random() < 0.25:
            angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.5, 0.5)
            across = np.cos(angle) * x + np.sin(angle) * y - offset
            picture = picture + 0.08 * np.exp(-((across / 0.02) ** 2))
        return picture
    shading = 1 + rng.uniform(0.05, 0.18) * (np.cos(rng.uniform(0, np.pi)) * x + np.sin(rng.uniform(0, np.pi)) * y)
    picture = picture * shading
    if rng.random() < 0.25:
        picture = picture + 0.06 * np.roll(picture, rng.integers(12, 40), axis=rng.integers(2))
    return np.hypot(picture + noise * rng.standard_normal(picture.shape), noise * rng.standard_normal(picture.shape))
