"""Which image an annotation means, by the name it gives. Names are compared with those of the samples, never opened."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from a3tune.data.annotations.shapes import Annotated
from a3tune.data.images import load_image
from a3tune.data.paths import inside
from a3tune.errors import DataError, shown
from a3tune.types import Region

Say = Callable[[str], None]
"""Takes a line about something that is left out."""
Regions = dict[Path, tuple[Region, ...]]


def matched(source: Path, annotated: Sequence[Annotated], images: Sequence[Path], say: Say) -> Regions:
    """The regions of each image. A name fits an image

    - relative: if the image's path ends in it, with as many folders as it gives;
    - absolute, or an address: if it ends in the image's own name, with the folders by which the images differ; of
      several such names the one with the longest common end counts.

    What fits no image, or several, or has another size is left out and said.
    """
    own = _own_parts(images)
    fitting: dict[Path, list[tuple[int, Annotated]]] = {}
    for item in annotated:
        try:
            for image in _images_named(item.image, images, own):
                fitting.setdefault(image, []).append((_common_end(image, item.image), item))
        except DataError as error:
            say(f"{source}: {error}")
    regions: Regions = {}
    for image, found in fitting.items():
        longest = max(length for length, _ in found)
        for length, item in found:
            absolute = item.image.startswith("/")
            if absolute and length < longest:
                say(f"{source}: {shown(item.image, 80)}: another name fits {image} better")
            elif size_fits(source, image, item.size, say):
                regions[image] = regions.get(image, ()) + item.regions
    return regions


def size_fits(source: Path, image: Path, size: Sequence[int], say: Say) -> bool:
    """Whether a mask of this height and width is one of the image; said if not, or if the image does not open."""
    try:
        width, height = load_image(image).size
    except DataError as error:
        say(f"{source}: {error}")
        return False
    if (height, width) != tuple(size):
        say(f"{source}: expected a mask of {width} x {height} pixels as {image}, got {size[1]} x {size[0]}")
        return False
    return True


def _images_named(name: str, images: Sequence[Path], own: dict[Path, tuple[str, ...]]) -> list[Path]:
    if name.startswith("/"):
        parts = PurePosixPath(name).parts
        if ".." in parts:
            raise DataError(f"expected the name of a file, {shown(name, 80)} leads out of its folder")
        fitting = [image for image in images if parts[-len(own[image]) :] == own[image]]
    else:
        parts = inside(Path(), name).parts
        fitting = [image for image in images if image.parts[-len(parts) :] == parts]
        if not fitting and _beside(name, images):
            return []  # the annotations of all splits, and rows of one
    if not fitting:
        raise DataError(f"names an image that is neither in the samples nor beside their images: {shown(name, 80)}")
    if len({image.parent / image.name.partition("#")[0] for image in fitting}) > 1:
        raise DataError(f"{shown(name, 80)} fits several images, {fitting[0]} and {fitting[1]}; give more folders")
    return fitting


def _own_parts(images: Sequence[Path]) -> dict[Path, tuple[str, ...]]:
    """Of each image its path below the folder that all of them are in."""
    shared = 0
    for level in zip(*(image.parent.parts for image in images), strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    return {image: image.parts[shared:] for image in images}


def _common_end(image: Path, name: str) -> int:
    """How many last parts of their names are the same."""
    pairs = list(zip(reversed(image.parts), reversed(PurePosixPath(name).parts), strict=False))
    return next((count for count, (one, other) in enumerate(pairs) if one != other), len(pairs))


def _beside(name: str, images: Iterable[Path]) -> bool:
    """Whether the file is there though no sample shows it."""
    path = inside(Path(), name)
    depth = len(path.parts) - 1
    return any(
        (root / path).is_file() for root in {image.parents[depth] for image in images if len(image.parents) > depth}
    )
