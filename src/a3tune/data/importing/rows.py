"""One raw row of a foreign table -> samples. Knows columns and pictures, no files of tables."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from a3tune.data.importing.columns import REPORTS, Columns
from a3tune.data.importing.pictures import Pictures
from a3tune.data.importing.turns import images_of, question_and_answers, without_marks
from a3tune.data.rows import sample_of
from a3tune.data.tables import plain
from a3tune.errors import DataError, shown
from a3tune.types import AnswerType, Sample

_TYPES: dict[str, AnswerType] = {name: name for name in get_args(AnswerType)}
_TYPES |= {"closed-ended": "closed", "open-ended": "open", "yes/no": "closed", "multiple-choice": "choice"}
_NOTHING = ("nan", "NaN", "<NA>")
_LONGEST = 100
"""Characters of a value that results can be broken down by."""


def samples_of(
    row: Mapping[str, Any], columns: Columns, name: str, folder: Path, pictures: Pictures, prompt: str | None
) -> tuple[list[Sample], list[str]]:
    """The questions of a row, and a line for each turn without a question or an answer.

    Several turns of a conversation become `name-1`, `name-2`, ... `prompt` is asked where there is no column of
    questions.

    Raises:
        DataError: something is missing or damaged; says which column.
    """
    if "" in row:
        raise DataError(str(row[""]))
    turns = _turns(row, columns, prompt)
    image = pictures.find(folder, _image(row, columns))
    rest = {field: _value(row, columns, field) for field in ("answer_type", "options", "regions")}
    meta = {key: text for key in columns.rest if (text := _short(row.get(key)))}
    meta |= _inner_meta(row, columns)
    if patient := _text(_value(row, columns, "patient")):
        meta["patient"] = patient
    samples, problems = [], []
    for turn, (question, answer) in enumerate(turns, start=1):
        if missing := _missing(question, answer):
            if len(turns) == 1:
                raise DataError(missing)
            problems.append(f"turn {turn}: {missing}")
            continue
        options, answer = _options(row, columns, rest["options"], answer)
        fields: dict[str, Any] = {
            "id": name if len(turns) == 1 else f"{name}-{turn}",
            "image": str(image),
            "prompt": question,
            "answer": answer,
            "meta": meta,
        }
        if kind := _answer_type(columns, rest["answer_type"], bool(options)):
            fields["answer_type"] = kind
        if options:
            fields["options"] = options
        if rest["regions"] is not None:
            fields["regions"] = plain(rest["regions"])
        samples.append(sample_of(f"row {name:.60}", Path(), fields))
    return samples, problems


def _missing(question: str, answer: str) -> str:
    empty = [name for name, text in (("question", question), ("answer", answer)) if not text.strip()]
    return f"no {' and no '.join(empty)}" if empty else ""


def _turns(row: Mapping[str, Any], columns: Columns, prompt: str | None) -> list[tuple[str, str]]:
    if "conversation" in columns.of:
        return question_and_answers(_value(row, columns, "conversation"))
    question = _text(_value(row, columns, "prompt")) if "prompt" in columns.of else prompt or ""
    answer = _text(_value(row, columns, "answer"))
    return [(without_marks(question), answer.strip())]


def _image(row: Mapping[str, Any], columns: Columns) -> Any:
    value = _value(row, columns, "image")
    inside = images_of(_value(row, columns, "conversation") or []) if "conversation" in columns.of else []
    return inside if value in (None, "", []) and inside else value


def _value(row: Mapping[str, Any], columns: Columns, field: str) -> Any:
    return row.get(columns.of[field]) if field in columns.of else None


def _text(value: Any) -> str:
    """A cell as text: lists of one are what they hold, yes and no may be booleans; "" for what pandas writes for
    nothing."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value != value or value in _NOTHING:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, str | int | float):
        raise DataError(f"expected a text, got {shown(value)}")
    return str(value)


def _short(value: Any) -> str:
    text = _text(value).strip() if isinstance(value, str | int | float) else ""
    return text if len(text) <= _LONGEST else ""


def _inner_meta(row: Mapping[str, Any], columns: Columns) -> dict[str, str]:
    value = plain(_value(row, columns, "meta") or {})
    if not isinstance(value, dict):
        raise DataError(f"meta: expected an object, got {shown(value)}")
    return {str(key): text for key, item in value.items() if (text := _short(item))}


def _options(row: Mapping[str, Any], columns: Columns, value: Any, answer: str) -> tuple[list[str], str]:
    """Options as texts, and the answer as the one of them that it names: by its text, or by its letter."""
    cells = [row.get(name) for name in columns.options] if columns.options else value
    if not isinstance(cells, list) or len(cells) < 2:
        return [], answer
    options = [text for cell in cells if (text := _bare(_text(cell)))]
    letters = {chr(ord("A") + at): text for at, text in enumerate(options)}
    fitting = [text for text in options if text.lower() == _bare(answer).lower()]
    chosen = fitting[0] if fitting else letters.get(answer.strip().rstrip(".):").upper())
    if chosen is None or any(count > 1 for count in Counter(options).values()):
        raise DataError(f"expected an answer that is one of {shown(options)}, got {shown(answer)}")
    return options, chosen


def _bare(option: str) -> str:
    """An option without its letter: "A: CT", "(b) MR"."""
    text = option.strip()
    head = text[:4].lstrip("( ")
    if len(head) > 1 and head[0].isalpha() and head[1] in ":)." and len(text) > 4:
        return text[text.index(head[1]) + 1 :].strip()
    return text


def _answer_type(columns: Columns, value: Any, choice: bool) -> AnswerType | None:
    if choice:
        return "choice"
    if columns.of.get("answer", "").lower() in REPORTS:
        return "report"
    kind = _TYPES.get(value.strip().lower().replace("_", "-")) if isinstance(value, str) else None
    return None if kind == "choice" else kind
