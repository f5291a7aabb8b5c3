"""The first sheet of an Excel workbook -> raw rows. Runs no formula: values are those that a spreadsheet saved."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from datetime import date, datetime, time, timedelta
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree
from zipfile import BadZipFile, ZipFile

from a3tune.errors import DataError, shown

_UNPACKED, _RATIO = 2**28, 100
"""A workbook that unpacks to more bytes, and to more than this multiple of its size, is refused."""
_CHUNK, _LONGEST_TAG = 2**20, 2**15
_MARKED = re.compile(
    rb'<mergeCell ref="([A-Z]+)(\d+):[A-Z]+(\d+)"'
    rb'|<c r="[A-Z]+\d+"(?:(?! t="str")[^>])*><f(?:[^>]*/>|[^<]*</f>)\s*(?:<v\s*/>|<v>\s*</v>|</c>)'
)
"""Cells that are merged; a formula without a value, which no spreadsheet has saved: those save "" as text."""
_ERRORS = ("#N/A", "#DIV/0!", "#REF!", "#NAME?", "#NULL!", "#NUM!", "#VALUE!")
_RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"


class NoValue:
    """A cell that shows something and holds nothing that can be used; its `repr` says why."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __repr__(self) -> str:
        return self._why


_FORMULA = NoValue("a formula without a value: save it in a spreadsheet")
Cells = tuple[Any, ...]
Spans = dict[int, list[tuple[int, int]]]
"""Row -> (column, last row) of each cell that begins there and is merged with those below it; all from 1."""


def read_excel(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (as the spreadsheet counts) and columns of every row that is not empty.

    Cells that are merged downwards hold their value in every row. Dates become text as ISO 8601 has it. Formulas
    without a saved value, and errors, are `NoValue`.

    Raises:
        DataError: openpyxl is missing, or this is no workbook, or one that unpacks to far more than its size.
    """
    try:
        import openpyxl
    except ImportError:
        raise DataError(
            f"{path}: Excel needs openpyxl, which is not installed: pip install 'a3tune[excel]', or save it as CSV"
        ) from None
    try:
        spans, formulas = _marks(path)
        with ExitStack() as opened:
            books = [openpyxl.load_workbook(path, read_only=True, data_only=True)]
            books += [openpyxl.load_workbook(path, read_only=True)] if formulas else []
            for book in books:
                opened.callback(book.close)
            names, rows = _sheet(books[0])
            written = _sheet(books[1])[1] if formulas else repeat(())
            yield from _rows(names, rows, written, spans)
    except DataError:
        raise
    except (BadZipFile, OSError, LookupError, ValueError, TypeError, SyntaxError, AttributeError) as error:
        raise DataError(f"{path}: expected an Excel workbook (.xlsx), could not read it: {shown(error)}") from None


def _rows(
    names: list[str], rows: Iterable[Cells], written: Iterable[Cells], spans: Spans
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with their numbers; `written` are formulas as they stand in the cells."""
    below: dict[int, tuple[int, Any]] = {}
    for number, (cells, texts) in enumerate(zip(rows, written, strict=False), start=2):
        values = [_cell(cell) for cell in cells]
        for at, text in enumerate(texts):
            if values[at] is None and isinstance(text, str) and text.startswith("="):
                values[at] = _FORMULA
        for column, last in spans.get(number, ()):
            if column <= len(values):
                below[column] = (last, values[column - 1])
        for column, (last, value) in below.items():
            if column <= len(values) and values[column - 1] is None and number <= last:
                values[column - 1] = value
        row = {name: value for name, value in zip(names, values, strict=False) if name}
        if any(value not in (None, "") for value in row.values()):
            yield number, row


def _sheet(book: Any) -> tuple[list[str], Iterator[Cells]]:
    """Names of the columns, and the cells below them. A sheet may say that it has 16,384 columns: only these count."""
    sheet = book.worksheets[0]
    head = next(sheet.iter_rows(max_row=1, values_only=True), ())
    names = ["" if name is None else str(name).strip() for name in head]
    while names and not names[-1]:
        names.pop()
    if not names:
        return [], iter(())
    return names, sheet.iter_rows(min_row=2, max_col=len(names), values_only=True)


def _marks(path: Path) -> tuple[Spans, bool]:
    """Cells that are merged downwards, and whether a formula has no value: openpyxl, row by row, tells neither."""
    spans: Spans = defaultdict(list)
    formulas = False
    with ZipFile(path) as packed:
        size = sum(item.file_size for item in packed.infolist())
        if size > max(_UNPACKED, _RATIO * path.stat().st_size):
            raise DataError(f"{path}: it unpacks to {size:,} bytes, far more than its size; save it as CSV")
        with packed.open(_first_sheet(packed)) as file:
            text = b""
            while chunk := file.read(_CHUNK):
                text += chunk
                end = 0
                for found in _MARKED.finditer(text):
                    end = found.end()
                    if found[1] is None:
                        formulas = True
                    elif int(found[2]) < int(found[3]):
                        spans[int(found[2])].append((_column(found[1]), int(found[3])))
                text = text[max(end, len(text) - _LONGEST_TAG) :]
    return spans, formulas


def _first_sheet(packed: ZipFile) -> str:
    """Its name in the archive."""
    first = ElementTree.fromstring(packed.read("xl/workbook.xml")).find(".//{*}sheet")
    relations = ElementTree.fromstring(packed.read("xl/_rels/workbook.xml.rels"))
    name = first.get(_RELATION) if first is not None else None
    target = next(str(item.get("Target")) for item in relations if item.get("Id") == name)
    return target.lstrip("/") if target.startswith("/") else (PurePosixPath("xl") / target).as_posix()


def _column(letters: bytes) -> int:
    """Number of a column, from 1: A, B, ..., Z, AA."""
    number = 0
    for letter in letters:
        number = 26 * number + letter - ord("A") + 1
    return number


def _cell(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, datetime):
        return (value.date() if value.time() == time() else value).isoformat()
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return str(value)
    return NoValue(f"the spreadsheet's error {value}") if value in _ERRORS else value
