"""Columns of foreign tables -> the public fields: which is which, guessed by name and shown, or said by the user."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from a3tune.errors import DataError

KNOWN = {
    "image": "image images img image_path image_file image_name img_name img_path img_file imagepath imagename "
    "file_name filename file filepath file_path path figure_path picture dicom",
    "prompt": "prompt question query instruction input problem",
    "answer": "answer gt_answer response output target reference_answer ground_truth caption report findings text "
    "label",
    "id": "id qid question_id uid row_id",
    "answer_type": "answer_type",
    "options": "options choices",
    "regions": "regions",
    "split": "split",
    "patient": "patient patient_id patientid subject subject_id subjectid",
    "conversation": "conversations conversation messages",
    "meta": "meta",
}
"""Field -> names of columns, those that say it best first."""
REPORTS = ("caption", "report", "findings")
"""Columns of answers that are whole texts."""
_OPTION = re.compile(r"^(?:choice|option)[ _]?[a-h1-8]$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column becomes which field."""

    of: Mapping[str, str]
    """Field -> column."""
    options: tuple[str, ...] = ()
    """Columns of one option each."""
    rest: tuple[str, ...] = field(default=())
    """All other columns; what is short in them becomes `meta`."""


def choose_columns(where: str, names: Iterable[str], said: Mapping[str, str]) -> Columns:
    """Columns by their names, without regard to case; `said` (field -> column) is what the user says.

    Raises:
        DataError: a name that the user says is no field or no column, or nothing can be the image or the answer.
    """
    names = list(names)
    said = {_field(name): column for name, column in said.items()}
    for name, column in said.items():
        if name not in KNOWN:
            raise DataError(f"--map {name}={column}: expected one of {', '.join(KNOWN)} before the =")
        if column not in names:
            raise DataError(f"--map {name}={column}: {where} has no such column, it has {_listed(names)}")
    if several := [column for column, count in Counter(said.values()).items() if count > 1]:
        raise DataError(f"--map: expected one field for a column, {several[0]:.60} is named for several")
    plain = {re.sub(r"[ -]", "_", name.strip().lower()): name for name in reversed(names)}
    of = dict(said)
    for name, known in KNOWN.items():
        free = [plain[item] for item in known.split() if item in plain and plain[item] not in of.values()]
        if name not in of and free:
            of[name] = free[0]
    if "text" in plain and "prompt" not in of and plain["text"] not in of.values() and "answer" in of:
        of["prompt"] = plain["text"]  # beside a column of answers it is the question
    if "conversation" in of:
        of = {name: column for name, column in of.items() if name not in ("prompt", "answer") or name in said}
    for name, kind in (("image", "the image"), ("answer", "the answer")):
        if name not in of and "conversation" not in of:  # which may hold its image, and has its answers
            raise DataError(
                f"{where}: no column looks like {kind}; name it with --map {name}=COLUMN, one of {_listed(names)}"
            )
    options = tuple(sorted(name for name in names if _OPTION.match(name.strip()) and name not in of.values()))
    if len(options) < 2 or "options" in of:
        options = ()
    used = {*of.values(), *options}
    return Columns(of, options, tuple(name for name in names if name not in used))


def _field(name: str) -> str:
    """The field that a user means: by its own name, or by one that its columns have ("question" is the prompt)."""
    return next((of for of, known in KNOWN.items() if name not in KNOWN and name in known.split()), name)


def _listed(names: list[str]) -> str:
    return ", ".join(f"{name:.40}" for name in names[:30]) + (", ..." if len(names) > 30 else "")
