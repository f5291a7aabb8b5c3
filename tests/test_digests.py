"""Digests of folders and of JSON objects: what is damaged is named, what was never sealed is taken as it stands."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a3tune.errors import RunError
from a3tune.machine.digests import DIGESTS, check_digests, sealed, unsealed, write_digests

ROW = {"id": "1", "score": 0.1, "tags": ["a", "é"], "size": {"height": 3}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "parts").mkdir()
    for name in ("weights.bin", "parts/0.bin", "README.md"):
        (tmp_path / name).write_bytes(name.encode())
    write_digests(tmp_path)
    return tmp_path


def test_a_whole_folder_passes_and_what_people_write_may_change(folder: Path) -> None:
    (folder / "README.md").write_text("another")
    (folder / "new.txt").write_text("new")
    assert check_digests(folder, RunError, "copy it anew")


def test_a_folder_without_digests_is_told_apart(tmp_path: Path) -> None:
    assert not check_digests(tmp_path, RunError, "copy it anew")


@pytest.mark.parametrize("name", ["weights.bin", "parts/0.bin"])
def test_a_changed_or_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"other")
    with pytest.raises(RunError, match=f"{re.escape(name)}: damaged.*copy it anew"):
        check_digests(folder, RunError, "copy it anew")
    (folder / name).unlink()
    with pytest.raises(RunError, match=f"{re.escape(name)}: missing.*copy it anew"):
        check_digests(folder, RunError, "copy it anew")


def test_only_some_files_may_be_asked_for(folder: Path) -> None:
    (folder / "parts" / "0.bin").unlink()
    assert check_digests(folder, RunError, "", ("weights.bin",))
    with pytest.raises(RunError, match="by name"):
        check_digests(folder, RunError, "", ("adapter.bin",))


@pytest.mark.parametrize(
    "text", ["", "{", "7", "[]", "null", '"x"', '{"../weights.bin": ""}', '{"/etc/hostname": ""}', '{"a\\u0000": ""}']
)
def test_damaged_digests_are_told(folder: Path, text: str) -> None:
    (folder / DIGESTS).write_text(text)
    with pytest.raises(RunError, match=rf"{DIGESTS}: damaged"):
        check_digests(folder, RunError, "copy it anew")


@given(st.data())
def test_a_flipped_bit_in_a_sealed_row_is_told_or_without_effect(data: st.DataObject) -> None:
    line = bytearray(json.dumps(sealed(ROW), ensure_ascii=False).encode())
    line[data.draw(st.integers(0, len(line) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = unsealed(json.loads(line))
    except ValueError:
        return
    assert {name: value for name, value in found.items() if name in ROW} == ROW


@pytest.mark.parametrize("value", [7, [], None, "x"])
def test_only_objects_are_sealed(value: object) -> None:
    with pytest.raises(ValueError, match="JSON object"):
        unsealed(value)


def test_a_row_that_was_never_sealed_is_taken() -> None:
    assert unsealed(ROW) == ROW == unsealed(sealed(ROW))
