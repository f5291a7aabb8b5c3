"""Users' own masks -> regions of samples: COCO, Label Studio, PNG masks, NIfTI label volumes. Knows no model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from a3tune.data.annotations.coco import read_coco
from a3tune.data.annotations.label_studio import read_label_studio
from a3tune.data.annotations.shapes import Annotated
from a3tune.data.annotations.values import mask_values, read_names, slice_values, value_regions
from a3tune.data.images import load_image, read_image, split_fragment
from a3tune.data.medical import nifti_grid
from a3tune.data.mention import mentioned
from a3tune.data.paths import inside
from a3tune.data.plain_json import parse_json
from a3tune.errors import DataError, shown
from a3tune.types import Region, Sample

Progress = Callable[[int, int], None]
_VOLUMES = (".nii", ".nii.gz")
_LISTED = 10


def attach_regions(samples: Sequence[Sample], source: Path, *, progress: Progress | None = None) -> list[Sample]:
    """Give samples the regions that `source` has of their images; the order stays, and so do all other samples.

    A sample gets the regions whose name its prompt names (`mention.py`) and those without a name, in place of what it
    had. `source` is one of

        masks.json        COCO (codes, polygons, boxes), or Label Studio's JSON export (brush, rectangles, polygons);
                          images are matched by file name, with as many folders as it gives
        folder/           PNG masks with the names of the images; `labels.json` {"1": "liver"} names the values
        labels.nii.gz     label volume on the grid of the one volume whose slices the samples show; `labels.json` beside
        folder/           label volumes with the names of the image volumes; `labels.json` names the values

    Masks have the size of their image. `progress(done, total)` counts annotated images.

    Raises:
        DataError: the format is unknown or damaged, an image that it names is neither in the samples nor beside their
            images, a mask has another size, or no sample gets a region.
    """
    images = sorted({sample.image for sample in samples if isinstance(sample.image, Path)})
    if _is_volume(source) or (source.is_dir() and any(_is_volume(file) for file in source.iterdir())):
        regions_of = _from_volumes(source, images, progress)
    elif source.is_dir():
        regions_of = _from_pictures(source, images, progress)
    else:
        regions_of = _from_annotations(source, images, progress)
    attached = [_with_regions(sample, regions_of) for sample in samples]
    if all(new is old for new, old in zip(attached, samples, strict=True)):
        names = sorted({region.name for regions in regions_of.values() for region in regions})
        raise DataError(
            f"{source}: no sample gets a region from it; it has masks of {len(regions_of)} images of these samples, "
            f"and no prompt names any of {', '.join(names[:_LISTED]) or 'no regions'}"
        )
    return attached


def _with_regions(sample: Sample, regions_of: dict[Path, tuple[Region, ...]]) -> Sample:
    regions = regions_of.get(sample.image, ()) if isinstance(sample.image, Path) else ()
    named = set(mentioned(sample.prompt, {region.name for region in regions}))
    chosen = tuple(region for region in regions if not region.name or region.name in named)
    return replace(sample, regions=chosen) if chosen else sample


def _from_annotations(source: Path, images: list[Path], progress: Progress | None) -> dict[Path, tuple[Region, ...]]:
    regions_of: dict[Path, tuple[Region, ...]] = {}
    missing: list[str] = []
    annotated = _read_annotations(source)
    for number, item in enumerate(annotated, start=1):
        fitting = _images_named(source, item.image, images)
        if not fitting and not _beside(item.image, images):
            missing.append(item.image)
        for image in fitting:
            _check_size(source, image, item.size)
            regions_of[image] = regions_of.get(image, ()) + item.regions
        if progress:
            progress(number, len(annotated))
    _refuse_missing(source, missing)
    return regions_of


def _read_annotations(source: Path) -> list[Annotated]:
    try:
        data: Any = parse_json(source.read_text(encoding="utf-8-sig"), constants=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{source}: expected masks: COCO or Label Studio JSON, a folder of PNG masks, or NIfTI labels: {error}"
        ) from None
    if isinstance(data, dict) and "annotations" in data and "images" in data:
        return read_coco(str(source), data)
    if isinstance(data, list) and data:
        return read_label_studio(str(source), data)
    raise DataError(
        f"{source}: expected COCO (images, annotations, categories) or a Label Studio export, got another JSON"
    )


def _from_pictures(source: Path, images: list[Path], progress: Progress | None) -> dict[Path, tuple[Region, ...]]:
    names_file = source / "labels.json"
    names = read_names(names_file)
    masks = sorted(file for file in source.iterdir() if file.suffix.lower() == ".png")
    if not masks:
        raise DataError(f"{source}: expected PNG masks or NIfTI label volumes in this folder, found none")
    regions_of: dict[Path, tuple[Region, ...]] = {}
    missing: list[str] = []
    folders = {image.parent for image in images}
    for number, mask in enumerate(masks, start=1):
        fitting = [image for image in images if image.stem == mask.stem and image != mask]
        if len(fitting) > 1:
            raise DataError(f"{mask}: expected one image of this name, got {len(fitting)}: {fitting[0]}, {fitting[1]}")
        if not fitting and not any(next(folder.glob(f"{_literal(mask.stem)}.*"), None) for folder in folders):
            missing.append(mask.name)
        for image in fitting:
            values = mask_values(mask)
            _check_size(mask, image, values.shape)
            regions_of[image] = value_regions(mask, values, names, names_file)
        if progress:
            progress(number, len(masks))
    _refuse_missing(source, missing)
    return regions_of


def _from_volumes(source: Path, images: list[Path], progress: Progress | None) -> dict[Path, tuple[Region, ...]]:
    slices = [(image, *split_fragment(image)) for image in images if _is_volume(split_fragment(image)[0])]
    regions_of: dict[Path, tuple[Region, ...]] = {}
    checked: set[Path] = set()
    for number, (image, volume, fragment) in enumerate(slices, start=1):
        labels = source / volume.name if source.is_dir() else source
        if source.is_dir() and not labels.is_file():
            continue
        if volume not in checked:
            _check_grid(labels, volume)
            checked.add(volume)
        names_file = source / "labels.json" if source.is_dir() else source.with_name(_bare(source) + ".json")
        values = slice_values(labels, fragment)
        regions_of[image] = value_regions(labels, values, read_names(names_file), names_file)
        if progress:
            progress(number, len(slices))
    if not regions_of:
        raise DataError(f"{source}: no sample shows a slice ('ct.nii.gz#axial=12') of a volume that it has labels of")
    return regions_of


def _check_grid(labels: Path, volume: Path) -> None:
    try:
        (shape, affine), (other, other_affine) = (nifti_grid(read_image(file)[0]) for file in (volume, labels))
    except DataError as error:
        raise DataError(f"{labels} or {volume}: {error}") from None
    if shape != other or not np.allclose(affine, other_affine, atol=1e-2):
        raise DataError(
            f"{labels}: expected labels on the grid of {volume}, {shape} voxels, got {other} or another place"
        )


def _check_size(source: Path, image: Path, size: Sequence[int]) -> None:
    width, height = load_image(image).size
    if (height, width) != tuple(size):
        raise DataError(f"{source}: expected a mask of {width} x {height} pixels as {image}, got {size[1]} x {size[0]}")


def _images_named(source: Path, name: str, images: list[Path]) -> list[Path]:
    parts = inside(Path(), name).parts
    fitting = [image for image in images if image.parts[-len(parts) :] == parts]
    if len(fitting) > 1:
        raise DataError(
            f"{source}: {shown(name, 80)} fits several images, {fitting[0]} and {fitting[1]}; give more folders"
        )
    return fitting


def _beside(name: str, images: Iterable[Path]) -> bool:
    """Whether the file is there though no sample shows it, as with the annotations of all splits and rows of one."""
    path = inside(Path(), name)
    depth = len(path.parts) - 1
    return any(
        (root / path).is_file() for root in {image.parents[depth] for image in images if len(image.parents) > depth}
    )


def _refuse_missing(source: Path, missing: list[str]) -> None:
    if missing:
        listed = ", ".join(missing[:_LISTED]) + (", ..." if len(missing) > _LISTED else "")
        raise DataError(
            f"{source}: names {len(missing)} images that are neither in the samples nor beside their images: {listed}"
        )


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith(_VOLUMES)


def _bare(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _literal(stem: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in stem)
