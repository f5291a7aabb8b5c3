"""IU-Xray VQA and OmniMedVQA as the CARES benchmark (Xia et al. 2024, CC BY 4.0) prepared them.

    iuxray_factuality.jsonl, images/CXR3030_IM-1405/0.png        images of R2Gen's IU X-Ray
    omnimedvqa_factuality.jsonl, Images/ACRIMA/Im002_ACRIMA.png  images of OmniMedVQA

Each line: {"question_id", "image", "text" (or "question"), "answer"}, for OmniMedVQA also "dataset". "<image>" is taken
out of the text. An answer that begins with yes or no, as "No (since ...).", is shortened to that word, and closed; any
other is open. Ids are numbers of lines: the file's own are not unique.

CARES has no training split. The paper splits 7:3, not saying how; Table 6's counts are no exact 7:3 of rows, as when
whole images are split, which is done here, with a seed: the counts come near the paper's, the rows are others.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from a3tune.data.sets.reading import Reading, Splits
from a3tune.data.sets.split import by_group
from a3tune.types import Sample

IU_XRAY, OMNI_MED_VQA = "iuxray_factuality.jsonl", "omnimedvqa_factuality.jsonl"
TEST_SHARE = 0.3


def recogniser(file: str) -> Callable[[Path], bool]:
    """Whether a folder looks like the CARES data set of this file."""
    return lambda folder: (folder / file).is_file()


def reader(file: str, prefix: str, meta: dict[str, str]) -> Callable[[Reading, str], Splits]:
    """A reader of one of the CARES files; `meta` holds for all of its questions."""

    def read(reading: Reading, variant: str) -> Splits:
        everything = Splits()
        rows = reading.load(file)
        for number, row in enumerate(rows, start=1):
            image = _image(reading, file, row)
            sample = image and _sample(reading, file, row, f"{prefix}-{number}", image, meta)
            reading.add(everything, "all", file, sample)
            if reading.progress:
                reading.progress(number, len(rows))
        train, test = by_group(everything.get("all", []), lambda sample: sample.image, TEST_SHARE)
        return reading.split_again(train, test)

    return read


def _image(reading: Reading, file: str, row: dict[str, Any]) -> Path | None:
    name = row.get("image")
    beside = isinstance(name, str) and name.lower().startswith("images/")
    return reading.image(file, reading.folder if beside else reading.folder / "images", name)


def _sample(reading: Reading, file: str, row: dict[str, Any], name: str, image: Path, meta: dict[str, str]) -> Sample:
    answer = reading.text(file, row, "answer")
    prompt = reading.text(file, row, "text" if "text" in row else "question").replace("<image>", "").strip()
    first = answer.lower().partition(" ")[0].strip(".,;:")
    source = reading.text(file, row, "dataset")
    return Sample(
        id=name,
        image=image,
        prompt=prompt,
        answer=first.capitalize() if first in ("yes", "no") else answer,
        answer_type="closed" if first in ("yes", "no") else "open",
        meta=meta | ({"dataset": source} if source else {}),
    )
