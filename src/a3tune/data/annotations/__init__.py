"""Users' own masks -> regions of samples: COCO, Label Studio, PNG masks, NIfTI label volumes. Knows no model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from a3tune.data.annotations.coco import read_coco
from a3tune.data.annotations.label_studio import read_label_studio
from a3tune.data.annotations.matching import Regions, Say, matched, size_fits
from a3tune.data.annotations.shapes import Annotated
from a3tune.data.annotations.values import mask_values, read_names, slice_values, value_regions
from a3tune.data.images import read_image, split_fragment
from a3tune.data.mention import mentioned
from a3tune.data.plain_json import parse_json
from a3tune.data.volume import nifti_grid
from a3tune.errors import DataError
from a3tune.types import Sample

Progress = Callable[[int, int], None]
_VOLUMES = (".nii", ".nii.gz", ".mgz", ".mgh")
_LISTED = 10


def attach_regions(
    samples: Sequence[Sample], source: Path, *, progress: Progress | None = None, say: Say = lambda line: None
) -> list[Sample]:
    """Give samples the regions that `source` has of their images; the order stays, and so do all other samples.

    A sample gets the regions whose name its prompt names (`mention.py`) and those without a name, in place of what it
    had. `source` is one of

        masks.json        COCO (codes, polygons, boxes), or Label Studio's JSON export (brush, rectangles, ellipses,
                          polygons); images are matched by name (`matching.py`)
        folder/           PNG masks with the names of the images; `labels.json` {"1": "liver"} names the values
        labels.nii.gz     label volume on the grid of the one volume whose slices the samples show; `labels.json` beside
        folder/           label volumes with the names of the image volumes; `labels.json` names the values

    Masks have the size of their image. An annotation that cannot be used is left out, and `say` gets a line about it.
    `progress(done, total)` counts annotated images.

    Raises:
        DataError: the format is unknown or the file damaged as a whole, or no sample gets a region; lists what was left
            out then.
    """
    images = sorted({sample.image for sample in samples if isinstance(sample.image, Path)})
    left_out: list[str] = []

    def note(line: str) -> None:
        left_out.append(line)
        say(line)

    if _is_volume(source) or (source.is_dir() and any(_is_volume(file) for file in source.iterdir())):
        regions_of = _from_volumes(source, images, note, progress)
    elif source.is_dir():
        regions_of = _from_pictures(source, images, note, progress)
    else:
        regions_of = matched(source, _read_annotations(source, note), images, note)
    attached = [_with_regions(sample, regions_of) for sample in samples]
    if all(new is old for new, old in zip(attached, samples, strict=True)):
        raise _nothing_attached(source, regions_of, left_out)
    return attached


def _nothing_attached(source: Path, regions_of: Regions, left_out: list[str]) -> DataError:
    names = sorted({region.name for regions in regions_of.values() for region in regions})
    listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    why = f"; no prompt names any of {listed}" if names else ""
    lines = "".join(f"\n  left out: {line}" for line in left_out[:_LISTED])
    rest = f"\n  and {len(left_out) - _LISTED:,} more" if len(left_out) > _LISTED else ""
    return DataError(
        f"{source}: no sample gets a region from it; it has masks of {len(regions_of)} images of these samples{why}"
        f"{lines}{rest}"
    )


def _with_regions(sample: Sample, regions_of: Regions) -> Sample:
    regions = regions_of.get(sample.image, ()) if isinstance(sample.image, Path) else ()
    named = set(mentioned(sample.prompt, {region.name for region in regions}))
    chosen = tuple(region for region in regions if not region.name or region.name in named)
    return replace(sample, regions=chosen) if chosen else sample


def _read_annotations(source: Path, say: Say) -> list[Annotated]:
    try:
        data: Any = parse_json(source.read_text(encoding="utf-8-sig"), constants=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{source}: expected masks: COCO or Label Studio JSON, a folder of PNG masks, or NIfTI labels: {error}"
        ) from None
    if isinstance(data, dict) and "annotations" in data and "images" in data:
        return read_coco(str(source), data, say)
    if isinstance(data, list) and data and all(isinstance(item, dict) and "image_id" in item for item in data):
        raise DataError(
            f"{source}: these are COCO results, which name images and categories by number only; put them as "
            '"annotations" beside the "images" and "categories" of the file that they were made with'
        )
    if isinstance(data, list) and data:
        return read_label_studio(str(source), data, say)
    raise DataError(
        f"{source}: expected COCO (images, annotations, categories) or a Label Studio export, got another JSON"
    )


def _from_pictures(source: Path, images: list[Path], say: Say, progress: Progress | None) -> Regions:
    names_file = source / "labels.json"
    names = read_names(names_file)
    masks = sorted(file for file in source.iterdir() if file.suffix.lower() == ".png")
    if not masks:
        raise DataError(f"{source}: expected PNG masks or NIfTI label volumes in this folder, found none")
    regions_of: Regions = {}
    folders = {image.parent for image in images}
    for number, mask in enumerate(masks, start=1):
        fitting = [image for image in images if image.stem == mask.stem and image != mask]
        if len(fitting) > 1:
            say(f"{mask}: expected one image of this name, got {len(fitting)}: {fitting[0]}, {fitting[1]}")
        elif not fitting and not any(next(folder.glob(f"{_literal(mask.stem)}.*"), None) for folder in folders):
            say(f"{mask}: names an image that is neither in the samples nor beside their images")
        elif fitting:
            try:
                values = mask_values(mask)
                if size_fits(mask, fitting[0], values.shape, say):
                    regions_of[fitting[0]] = value_regions(mask, values, names, names_file, say)
            except DataError as error:
                say(str(error))
        if progress:
            progress(number, len(masks))
    return regions_of


def _from_volumes(source: Path, images: list[Path], say: Say, progress: Progress | None) -> Regions:
    slices = [(image, *split_fragment(image)) for image in images if _is_volume(split_fragment(image)[0])]
    regions_of: Regions = {}
    fits: dict[Path, bool] = {}
    names_file = source / "labels.json" if source.is_dir() else source.with_name(_bare(source) + ".json")
    names = read_names(names_file)
    for number, (image, volume, fragment) in enumerate(slices, start=1):
        labels = source / volume.name if source.is_dir() else source
        if source.is_dir() and not labels.is_file():
            continue
        try:
            if volume not in fits:
                fits[volume] = False
                _check_grid(labels, volume)
                fits[volume] = True
            if fits[volume]:
                regions_of[image] = value_regions(labels, slice_values(labels, fragment), names, names_file, say)
        except DataError as error:
            say(str(error))
        if progress:
            progress(number, len(slices))
    if not fits:
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


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith(_VOLUMES)


def _bare(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[0]


def _literal(stem: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in stem)
