"""Workbooks as people have them, and as attackers make them."""

import re
import time
from datetime import date, datetime
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest

from a3tune.data.importing import import_rows
from a3tune.data.importing.excel import read_excel
from a3tune.errors import DataError
from test_importing import one_file, png

openpyxl = pytest.importorskip("openpyxl")
HEAD = ["image", "question", "answer"]


def workbook(path: Path, *rows: list[Any], merged: tuple[str, ...] = (), sheets: tuple[str, ...] = ()) -> Path:
    book = openpyxl.Workbook()
    for row in (HEAD, *rows):
        book.active.append(row)
    for cells in merged:
        book.active.merge_cells(cells)
    for name in sheets:
        book.create_sheet(name).append(["image", "notes"])
    book.save(path)
    return path


def rewritten(path: Path, old: bytes, new: bytes) -> Path:
    """With other bytes in its first sheet."""
    with ZipFile(path) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    assert old in files["xl/worksheets/sheet1.xml"]
    files["xl/worksheets/sheet1.xml"] = files["xl/worksheets/sheet1.xml"].replace(old, new)
    with ZipFile(path, "w", ZIP_DEFLATED) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return path


def test_rows_of_the_first_sheet(tmp_path):
    png(tmp_path / "7.png")
    source = workbook(
        tmp_path / "q.xlsx", [7.0, "How many?", 2.0], [None] * 3, ["7.png", "Is it?", True], sheets=("notes",)
    )
    assert [number for number, _ in read_excel(source)] == [2, 4]
    assert [(row.prompt, row.answer) for row in one_file(source)] == [("How many?", "2"), ("Is it?", "yes")]
    source.write_bytes(b"PK no workbook")
    with pytest.raises(DataError, match="expected an Excel workbook"):
        import_rows(source, tmp_path / "out")


def test_dates_are_text(tmp_path):
    source = workbook(tmp_path / "q.xlsx", ["a.png", date(2020, 1, 2), datetime(2020, 1, 2, 3, 4)])
    assert next(read_excel(source))[1] == {"image": "a.png", "question": "2020-01-02", "answer": "2020-01-02T03:04:00"}


def test_merged_cells_hold_their_value_in_every_row(tmp_path):
    png(tmp_path / "a.png", 1)
    png(tmp_path / "b.png", 2)
    rows = [["a.png", "1?", "x"], [None, "2?", "x"], [None, "3?", "x"], ["b.png", "4?", "x"], [None, "5?", "x"]]
    source = workbook(tmp_path / "q.xlsx", *rows, merged=("A2:A4", "B5:C5"))
    done = import_rows(source, tmp_path / "out", shares=[1])
    assert [row.image.name for row in one_file(source)] == ["a.png"] * 3  # of B5:C5 the answer is empty
    assert [line.partition(" ")[0] for line in done.left_out] == ["q.xlsx:5:", "q.xlsx:6:"]


def test_formulas_and_errors_are_told(tmp_path):
    png(tmp_path / "a.png")
    rows = [["a.png", "=B1", "yes"], ["a.png", "Is it?", "#N/A"], ["a.png", "Is it?", "no"]]
    source = workbook(tmp_path / "q.xlsx", *rows)
    done = import_rows(source, tmp_path / "out", shares=[1])
    assert [line.partition("got ")[2] for line in done.left_out] == [
        "a formula without a value: save it in a spreadsheet",
        "the spreadsheet's error #N/A",
    ]
    rewritten(source, b"<f>B1</f><v />", b"<f>B1</f><v>1</v>")  # as a spreadsheet saves it
    assert [row.prompt for row in one_file(source)] == ["1", "Is it?"]


def test_what_unpacks_to_far_more_is_refused(tmp_path):
    source = workbook(tmp_path / "q.xlsx", ["a.png", "q?", "a"])
    rewritten(source, b"</sheetData>", b" " * 300_000_000 + b"</sheetData>")
    assert source.stat().st_size < 400_000
    with pytest.raises(DataError, match=r"unpacks to 300,\d\d\d,\d\d\d bytes"):
        list(read_excel(source))
    laughs = b"".join(b'<!ENTITY x%d "%s">' % (at, b"&x%d;" % (at - 1) * 10) for at in range(1, 12))
    bomb = workbook(tmp_path / "laughs.xlsx", ["a.png", "q?", "a"])
    rewritten(bomb, b"<worksheet", b'<!DOCTYPE x [<!ENTITY x0 "aaaaaaaaaa">' + laughs + b"]><worksheet")
    rewritten(bomb, b"</sheetData>", b'<row r="3"><c r="A3" t="str"><v>&x11;</v></c></row></sheetData>')
    with pytest.raises(DataError, match="expected an Excel workbook"):
        list(read_excel(bomb))


def test_a_sheet_that_says_it_is_full_is_read_as_it_is(tmp_path):
    """Formatted cells far away make a sheet of a million rows and 16,384 columns: it took five minutes."""
    source = workbook(tmp_path / "q.xlsx", ["a.png", "q?", "a"])
    far = b'<row r="1048576"><c r="XFD1048576"><v>1</v></c></row></sheetData>'
    rewritten(source, b"</sheetData>", far)
    rewritten(source, b'ref="A1:C2"', b'ref="A1:XFD1048576"')
    start = time.process_time()
    assert len(list(read_excel(source))) == 1
    assert time.process_time() - start < 30


def test_without_openpyxl(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (tmp_path / "q.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=re.escape("a3tune[excel]")):
        import_rows(tmp_path / "q.xlsx", tmp_path / "out")
