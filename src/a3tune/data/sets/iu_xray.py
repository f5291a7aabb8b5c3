"""IU X-Ray reports (Demner-Fushman et al. 2016), in the layout of R2Gen, whose counts the paper gives.

    annotation.json                    {"train": [{"id", "report", "image_path": [...]}, ...], "val": ..., "test": ...}
    images/CXR2384_IM-0942/0.png       the frontal view; 1.png is the lateral one

R2Gen's reports are the findings section, and its 2,069/296/590 studies those that have two views. Where the originals
(`ecgen-radiology/<n>.xml` of the NLM) lie beside, their impression is put behind the findings, as in the paper. Studies
whose image is not on the disk are left out.
"""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from a3tune.data.sets.reading import Reading, Splits
from a3tune.types import Sample

PROMPT = "Write the findings and the impression of the report on this chest X-ray."
_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_STUDY = re.compile(r"^CXR(\d+)_")


def recognises(folder: Path) -> bool:
    """Whether this looks like R2Gen's IU X-Ray."""
    return (folder / "annotation.json").is_file()


def read(reading: Reading, variant: str) -> Splits:
    """The reports of the published splits, each with its frontal view."""
    splits = Splits()
    parts = reading.load_object("annotation.json", tuple(_SPLITS.values()))
    studies = [(split, row) for split, name in _SPLITS.items() for row in parts.get(name, [])]
    for number, (split, row) in enumerate(studies, start=1):
        where = "annotation.json"
        paths = row.get("image_path")
        first = paths[0] if isinstance(paths, list) and paths else None
        image, why = reading.image_there(where, reading.folder / "images", first)
        reading.add(splits, split, where, image and _sample(reading, where, row, image), why)
        if reading.progress:
            reading.progress(number, len(studies))
    return splits


def _sample(reading: Reading, where: str, row: dict[str, Any], image: Path) -> Sample:
    name = reading.text(where, row, "id")
    impression = _impression(reading, name)
    report = " ".join((reading.text(where, row, "report") + " " + impression).split())
    return Sample(f"iu-xray-{name}", image, PROMPT, report, "report", meta={"modality": "X-Ray", "organ": "chest"})


def _impression(reading: Reading, name: str) -> str:
    match = _STUDY.match(name)
    file = reading.folder / "ecgen-radiology" / f"{match[1]}.xml" if match else None
    if file is None or not file.parent.is_dir() or not reading.require(file, "its report has findings only"):
        return ""
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError, ValueError) as error:
        reading.problem(file, f"expected an XML report: {error}", blocking=False)
        return ""
    return next((item.text or "" for item in root.iter("AbstractText") if item.get("Label") == "IMPRESSION"), "")
