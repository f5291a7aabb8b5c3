"""Questions with true regions out of two segmented volumes: one CT, one MR (TotalSegmentator's test files).

    python organs.py --organs DIR --out data/organs.jsonl

`DIR` holds ct.nii.gz, ct_labels.nii.gz, ct_labels.json and the same for mr. One patient each, labels made by a
segmentation model: enough to see whether regions are found and looked at, not for claims about patients.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from a3tune.data.annotations.values import read_names, slice_values
from a3tune.data.rows import write_rows
from a3tune.errors import DataError
from a3tune.masks import encode_mask
from a3tune.types import Region, Sample

ORGANS = ("spleen", "kidney_right", "kidney_left", "liver", "stomach", "pancreas", "aorta", "gallbladder", "colon")
LEAST_AREA = 0.01
"""Share of the slice: smaller cuts through an organ are not asked about."""


def slices(folder: Path) -> Iterator[tuple[str, int, Path, dict[str, np.ndarray]]]:
    """Modality, number and image of each axial slice, and the masks of its structures by name, bool [height, width]."""
    for modality in ("ct", "mr"):
        names = read_names(folder / f"{modality}_labels.json")
        for index in range(1000):
            try:
                values = slice_values(folder / f"{modality}_labels.nii.gz", f"axial={index}")
            except DataError:
                break  # past the last slice
            masks = {names.get(int(value), ""): values == value for value in np.unique(values)}
            yield modality, index, folder / f"{modality}.nii.gz#axial={index}", masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--organs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    samples: list[Sample] = []
    for modality, index, image, masks in slices(options.organs):
        for name, mask in masks.items():
            if name in ORGANS and mask.mean() >= LEAST_AREA:
                spoken = " ".join(reversed(name.split("_")))
                samples.append(
                    Sample(
                        id=f"{modality}-{index}-{name}",
                        image=image,
                        prompt=f"Is the {spoken} visible in this image?",
                        answer="Yes",
                        answer_type="closed",
                        regions=(Region(mask=encode_mask(mask), name=spoken),),
                        meta={"modality": modality, "organ": spoken, "location": "abdomen"},
                    )
                )
    write_rows(options.out, samples)
    print(f"{len(samples)} questions about {len({sample.image for sample in samples})} slices in {options.out}")


if __name__ == "__main__":
    main()
