"""The data sets of the paper in their published layouts: recognise, check, read, write as rows. Knows no model."""

import difflib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from a3tune.data.rows import write_rows
from a3tune.data.sets import cares, hub, iu_xray, mimic_cxr, omni_med_vqa, path_vqa, slake, vqa_rad
from a3tune.data.sets.reading import Problem, Progress, Reading, Splits
from a3tune.errors import DataError, shown
from a3tune.machine.files import all_or_none, write_atomic
from a3tune.types import Sample

_LISTED = 10
_IMAGE_SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png"}


@dataclass(frozen=True, slots=True)
class DataSet:
    """How a data set is recognised and read, and what the paper's Table 6 says of it."""

    title: str
    recognises: Callable[[Path], bool]
    read: Callable[[Reading, str], Splits]
    published: Mapping[str, int]
    """Rows by split in Table 6."""
    note: str
    """Where the published counts come from, and whether they have been reproduced with the published files."""
    query: str
    """What a ranker best reads (`labels.query`): the published template, with what the rows know of their images."""
    variants: tuple[str, ...] = ("paper",)
    """Named ways to choose and split the rows; the first is the default."""


@dataclass(frozen=True, slots=True)
class Check:
    """What a folder holds of a data set."""

    name: str
    title: str
    folder: Path
    variant: str
    rows: Mapping[str, int]
    """Rows in the files, by split."""
    usable: Mapping[str, int]
    """Of these, rows that have a question, an answer and a named image."""
    with_regions: Mapping[str, int]
    """Of these, rows whose regions are known."""
    left_out: Mapping[str, int]
    """Rows that are not usable, by the reason; with the usable ones they are all rows."""
    published: Mapping[str, int]
    problems: tuple[Problem, ...]
    note: str

    @property
    def ok(self) -> bool:
        """Whether nothing keeps the data set from being prepared, and there is something to prepare."""
        return any(self.usable.values()) and not any(problem.blocking for problem in self.problems)


DATA_SETS: dict[str, DataSet] = {
    "slake": DataSet(
        "SLAKE",
        slake.recognises,
        slake.read,
        {"train": 4919, "test": 1061},
        "English questions; counts reproduced with the published question files (one training row has no answer)",
        "Medical image of {organ}. {question}",
    ),
    "vqa-rad": DataSet(
        "VQA-RAD",
        vqa_rad.recognises,
        vqa_rad.read,
        {"train": 1797, "test": 451},
        "free-form and paraphrased questions only; counts reproduced with the published files",
        "Medical image of {organ}. {question}",
        vqa_rad.VARIANTS,
    ),
    "path-vqa": DataSet(
        "PathVQA",
        path_vqa.recognises,
        path_vqa.read,
        {"train": 19755, "test": 6761},
        "counts of the published qas, not verified here; the Hugging Face form has 19,654 and 6,719 (no duplicates)",
        "Pathology image. {question}",
    ),
    "iu-xray-vqa": DataSet(
        "IU-Xray VQA (CARES)",
        cares.recogniser(cares.IU_XRAY),
        cares.reader(cares.IU_XRAY, "iu-xray-vqa", {"modality": "X-Ray", "organ": "chest"}),
        {"train": 1789, "test": 784},
        "7:3 by image with our seed: near the published counts, not equal; not verified here",
        "Medical image of {organ}. {question}",
    ),
    "omnimedvqa": DataSet(
        "OmniMedVQA (CARES)",
        cares.recogniser(cares.OMNI_MED_VQA),
        cares.reader(cares.OMNI_MED_VQA, "omnimedvqa", {}),
        {"train": 6155, "test": 2642},
        "7:3 by image with our seed: near the published counts, not equal; not verified here",
        "Medical image. {question}",
    ),
    "omnimedvqa-choice": DataSet(
        "OmniMedVQA (multiple choice)",
        omni_med_vqa.recognises,
        omni_med_vqa.read,
        {},
        "the paper asks the questions openly (omnimedvqa); 7:3 by image with our seed",
        "{modality} image. {question}",
    ),
    "iu-xray": DataSet(
        "IU-Xray reports",
        iu_xray.recognises,
        iu_xray.read,
        {"train": 2069, "test": 590},
        "studies of R2Gen's annotation.json; not verified here",
        "Medical image of {organ}. {question}",
    ),
    "mimic-cxr": DataSet(
        "MIMIC-CXR reports",
        mimic_cxr.recognises,
        mimic_cxr.read,
        {"train": 1902, "test": 441},
        "2,000 and 500 studies drawn with our seed, less those with few words; not verified here",
        "Medical image of {organ}. {question}",
    ),
}


def detect(folder: Path) -> str:
    """Name of the data set whose layout a folder has.

    Raises:
        DataError: the folder is missing or empty, or fits none or several of `DATA_SETS`.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        raise DataError(
            f"{folder}: expected the folder of a data set, it is {'empty' if folder.is_dir() else 'missing'}"
        )
    names = [name for name, data_set in DATA_SETS.items() if data_set.recognises(folder)]
    if len(names) != 1:
        fits = f"fits {' and '.join(names)}: name one" if names else "fits none; docs/data.md has their layouts"
        if not names and (found := hub.counts(folder)):
            rows = ", ".join(f"{count:,} {split}" for split, count in found.items())
            fits = f"is parquet with {rows} rows, as many as none of them: --name says which it is"
        fits += "" if names else "; `a3tune data import` makes rows of a set of your own"
        raise DataError(f"{folder}: expected the layout of one of {', '.join(DATA_SETS)}, it {fits}")
    return names[0]


def check(
    folder: Path, name: str | None = None, *, variant: str | None = None, progress: Progress | None = None
) -> Check:
    """Everything that a folder holds of a data set, and all that is wrong, beside the paper's counts.

    `name` is a key of `DATA_SETS`, detected if left out; `variant` one of its variants. `progress(done, total)` counts
    rows or files.

    Raises:
        DataError: the folder is missing or empty, or the name or variant is unknown (lists the known ones).
    """
    return _read(folder, name, variant, progress)[0]


def prepare(
    folder: Path, out: Path, name: str | None = None, *, variant: str | None = None, progress: Progress | None = None
) -> dict[str, Path]:
    """Write a data set as rows (`rows.py`): `out/train.jsonl`, `validation.jsonl`, `test.jsonl`, what splits it has.

    Images stay where they are, and rows name them relative to `out`; images that came inside a table are written to
    `out/images`. Arguments as `check`.

    Raises:
        DataError: as `check`; something is wrong that `check` would call blocking.
        OutputError: the disk refuses.
    """
    checked, splits = _read(folder, name, variant, progress)
    blocking = [f"{problem.file}: {problem.what}" for problem in checked.problems if problem.blocking]
    if blocking or not any(splits.values()):
        listed = "\n".join(f"  {line}" for line in blocking[:_LISTED] or ["no usable row in it"])
        rest = f"\n  and {len(blocking) - _LISTED} more" if len(blocking) > _LISTED else ""
        raise DataError(
            f"{folder}: expected a complete {checked.title}; `a3tune data check` lists all:\n{listed}{rest}"
        )
    files = {split: out / f"{split}.jsonl" for split in splits}
    with all_or_none() as new:  # some of its splits are no data set, and would be in the way of the same command
        for split, samples in splits.items():
            write_rows(new(files[split]), [_on_disk(sample, out / "images") for sample in samples])
    return files


def format_check(check: Check) -> str:
    """A check as a text table beside Table 6, then every problem by file."""
    lines = [f"{check.title} ({check.name}, variant {check.variant}) in {check.folder}", ""]
    lines += [f"{'split':<12}{'rows':>10}{'usable':>10}{'with regions':>14}{'Table 6':>10}"]
    for split in dict.fromkeys([*check.rows, *check.published]):
        published = f"{check.published[split]:,}" if split in check.published else "-"
        counts = (check.rows.get(split, 0), check.usable.get(split, 0))
        regions = check.with_regions.get(split, 0)
        lines.append(f"{split:<12}{counts[0]:>10,}{counts[1]:>10,}{regions:>14,}{published:>10}")
    if check.left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in check.left_out.items())
        lines += ["", f"{sum(check.left_out.values()):,} rows left out: {reasons}"]
    lines += ["", f"Table 6: {check.note}.", ""]
    for blocking, title in ((True, "must be mended"), (False, "can be done without")):
        problems = [problem for problem in check.problems if problem.blocking is blocking]
        if problems:
            lines += [f"{len(problems)} {title}:", *(f"  {problem.file}: {problem.what}" for problem in problems), ""]
    nothing = "" if any(check.usable.values()) else ": no usable row"
    return "\n".join([*lines, "complete" if check.ok else f"not complete{nothing}"])


def _read(folder: Path, name: str | None, variant: str | None, progress: Progress | None) -> tuple[Check, Splits]:
    if name is not None and name not in DATA_SETS:
        close = difflib.get_close_matches(name, DATA_SETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"data set {shown(name)}: expected one of {', '.join(DATA_SETS)}{hint}")
    if name is None or not folder.is_dir():
        name = detect(folder)
    data_set = DATA_SETS[name]
    variant = variant or data_set.variants[0]
    if variant not in data_set.variants:
        raise DataError(f"variant {shown(variant)}: expected one of {', '.join(data_set.variants)} for {name}")
    reading = Reading(folder, progress)
    splits = data_set.read(reading, variant)
    checked = Check(
        name=name,
        title=data_set.title,
        folder=folder,
        variant=variant,
        rows=dict(reading.rows),
        usable={split: len(samples) for split, samples in splits.items()},
        with_regions={split: sum(bool(sample.regions) for sample in samples) for split, samples in splits.items()},
        left_out=dict(reading.left_out),
        published=data_set.published if variant == data_set.variants[0] else {},
        problems=reading.all_problems(),
        note=data_set.note,
    )
    return checked, splits


def _on_disk(sample: Sample, folder: Path) -> Sample:
    """The sample with its image as a file, named by its content."""
    if isinstance(sample.image, Path):
        return sample
    path = folder / (hashlib.sha256(sample.image).hexdigest()[:20] + _IMAGE_SUFFIXES.get(sample.image[:2], ".img"))
    if not path.is_file() or path.read_bytes() != sample.image:
        write_atomic(path, sample.image)
    return replace(sample, image=path)
