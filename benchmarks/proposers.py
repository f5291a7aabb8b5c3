"""What proposers without weights find: the ceiling of labels, by modality and structure.

    python benchmarks/proposers.py [--organs DIR] [--films DIR] [--quick] [--out FILE]

A structure counts as found as `a3tune label` counts it (`labels/quality.py`): one segment of all meets it, part by
part, with an IoU of .5. `--organs` holds ct.nii.gz, ct_labels.nii.gz, ct_labels.json and the same for mr: all axial
slices, every structure that covers `LEAST` of one. `--films` holds VQA-RAD's images: 24 chest radiographs, whose lungs
and hearts were outlined by eye (`films.json`, corners in percent of width and height), not by a radiologist. Phantom
scans are always there. Proposers were developed on the lower half of the slices and on every second film; the
other half was only measured. Intervals are 95 %, over images; all slices of a volume are of one patient, so theirs are
too narrow.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from measure import about, listed, table, write
from PIL import Image, ImageDraw

from a3tune.data.annotations.values import read_names, slice_values
from a3tune.data.images import load_image
from a3tune.data.phantom.dataset import write_phantom
from a3tune.data.rows import read_rows
from a3tune.errors import DataError
from a3tune.labels.propose import Proposer, make_proposer
from a3tune.labels.quality import label_quality
from a3tune.masks import encode_mask
from a3tune.metrics.stats import Estimate, mean_interval, paired_difference
from a3tune.types import ImageSource, Labels, Region, Sample

LEAST = 0.003
"""Share of a slice from which a structure in it counts."""
OUTLINES = Path(__file__).with_name("films.json")
DEVELOPED, MEASURED = "developed on", "measured only"
PROPOSERS = {
    "superpixels": make_proposer("superpixels"),
    "regions": make_proposer("regions"),
    "superpixels, 128 segments": make_proposer("superpixels", settings={"max_segments": 128}),
    "regions, 128 segments": make_proposer("regions", settings={"max_segments": 128}),
}


class Case(NamedTuple):
    """An image with the regions of what is in it."""

    modality: str
    half: str
    image: ImageSource
    structures: dict[str, Region]


class Group(NamedTuple):
    """What rows of the table are about."""

    modality: str
    half: str


@dataclass(frozen=True)
class Found:
    """What a proposer found in the images of a group: a number per structure, and per image."""

    images: list[str]
    """Of each structure."""
    structures: list[str]
    recall: list[float]
    """Share of the structure's parts that were found."""
    iou: list[float]
    """Mean of the best IoU with each part."""
    segments: list[int]
    seconds: list[float]
    """Processor time of each image."""


def slices(folder: Path, modality: str) -> list[Case]:
    """The axial slices of a segmented volume."""
    names = read_names(folder / f"{modality}_labels.json")
    cases: list[dict[str, Region]] = []
    while True:
        try:
            values = slice_values(folder / f"{modality}_labels.nii.gz", f"axial={len(cases)}")
        except DataError:
            break  # past the last slice
        masks = {names[value]: values == value for value in map(int, np.unique(values)) if value in names}
        cases.append(
            {name: Region(mask=encode_mask(mask), name=name) for name, mask in masks.items() if mask.mean() >= LEAST}
        )
    return [
        Case(
            {"ct": "CT", "mr": "MR"}[modality],
            DEVELOPED if index < len(cases) // 2 else MEASURED,
            folder / f"{modality}.nii.gz#axial={index}",
            structures,
        )
        for index, structures in enumerate(cases)
        if structures
    ]


def films(folder: Path) -> Iterator[Case]:
    """The radiographs of `films.json`."""
    for number, (name, outlines) in enumerate(json.loads(OUTLINES.read_text()).items()):
        size = load_image(folder / name).size
        structures: dict[str, Region] = {}
        for structure, corners in outlines.items():
            inside = Image.new("L", size)
            ImageDraw.Draw(inside).polygon([(x * size[0] / 100, y * size[1] / 100) for x, y in corners], fill=1)
            structures[structure] = Region(mask=encode_mask(np.asarray(inside)), name=structure)
        yield Case("radiograph", MEASURED if number % 2 else DEVELOPED, folder / name, structures)


def phantoms(folder: Path, count: int) -> Iterator[Case]:
    """Phantom scans; of a structure that several questions are about the first region counts."""
    cases: dict[ImageSource, dict[str, Region]] = {}
    for sample in read_rows(write_phantom(folder, {"test": count})["test"]):
        known = cases.setdefault(sample.image, {})
        for region in sample.regions or ():
            known.setdefault(region.name or "?", region)
    for image, structures in list(cases.items())[:count]:
        if structures:
            yield Case("phantom", MEASURED, image, structures)


def look(proposer: Proposer, cases: list[Case]) -> dict[Group, Found]:
    """Run a proposer on all images."""
    found: dict[Group, Found] = {}
    proposer(load_image(cases[0].image))  # imports and caches are not its cost
    for case in cases:
        group = found.setdefault(Group(case.modality, case.half), Found([], [], [], [], [], []))
        image = load_image(case.image)
        start = time.process_time()
        segments = tuple(proposer(image))
        group.seconds.append(time.process_time() - start)
        group.segments.append(len(segments))
        labels = Labels("", segments, (1.0,) * len(segments))
        for name, region in case.structures.items():
            sample = Sample(name, case.image, "?", "", "open", (region,))
            quality = label_quality([sample], lambda _, labels=labels: labels)["all"]
            group.images.append(str(case.image))
            group.structures.append(name)
            group.recall.append(quality.ceiling_recall)
            group.iou.append(quality.ceiling_iou)
    return found


@dataclass(frozen=True)
class Row:
    """A proposer on a group of images."""

    modality: str
    half: str
    proposer: str
    structures: int
    images: int
    found: Estimate
    more: Estimate
    """Than superpixels, paired by structure."""
    iou: Estimate
    segments: float
    seconds: float
    """Median of an image."""

    def cells(self) -> list[str]:
        """The row of the table."""
        counts = f"{self.structures} in {self.images}"
        more = "" if self.proposer == "superpixels" else _interval(self.more, "+")
        numbers = [_interval(self.found), more, _interval(self.iou), f"{self.segments:.0f}", f"{self.seconds:.3f}"]
        return [self.modality, self.half, self.proposer, counts, *numbers]


def summary(found: dict[str, dict[Group, Found]]) -> list[Row]:
    """All proposers on all groups."""
    rows: list[Row] = []
    for group, reference in found["superpixels"].items():
        for name, own in found.items():
            here = own[group]
            estimates = (
                mean_interval(here.recall, here.images),
                paired_difference(here.recall, reference.recall, here.images),
                mean_interval(here.iou, here.images),
            )
            counts = (len(here.recall), len(here.segments))
            rows.append(
                Row(*group, name, *counts, *estimates, float(np.mean(here.segments)), float(np.median(here.seconds)))
            )
    return rows


def by_structure(found: dict[str, dict[Group, Found]]) -> list[list[str]]:
    """Modality, structure, its images in the half that was measured only, and the share that each proposer found."""
    rows: list[list[str]] = []
    for group, reference in found["superpixels"].items():
        for name in sorted(set(reference.structures)) if group.half == MEASURED else ():
            chosen = [index for index, own in enumerate(reference.structures) if own == name]
            shares = [np.mean([own[group].recall[index] for index in chosen]) for own in found.values()]
            rows.append([group.modality, name, str(len(chosen)), *(f"{share:.2f}" for share in shares)])
    return rows


def _interval(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.mean:{sign}.2f} [{estimate.low:{sign}.2f}, {estimate.high:{sign}.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organs", type=Path, help="folder of the volumes")
    parser.add_argument("--films", type=Path, help="folder of VQA-RAD's images")
    parser.add_argument("--quick", action="store_true", help="few phantom scans")
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cases = [case for kind in ("ct", "mr") if options.organs for case in slices(options.organs, kind)]
        cases += films(options.films) if options.films else []
        cases += phantoms(Path(folder), 3 if options.quick else 40)
        found = {name: look(proposer, cases) for name, proposer in PROPOSERS.items()}
    rows, structures = summary(found), by_structure(found)
    header = ["Modality", "Images were", "Proposer", "Structures in images", "Found", "More than superpixels"]
    first = table([*header, "Mean best IoU", "Segments", "s/image"], [row.cells() for row in rows])
    second = table(["Modality", "Structure", "Images", *found], structures)
    lines = ["# Proposers without weights", "", *listed(about()), ""]
    lines += [first, "", f"Share found by structure, images that were {MEASURED}:", "", second]
    write(options.out, {"about": about(), "groups": rows, "structures": structures}, "\n".join(lines))


if __name__ == "__main__":
    main()
