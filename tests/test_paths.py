from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a3tune.data.paths import inside
from a3tune.errors import DataError


def test_names_inside(tmp_path):
    assert inside(tmp_path, "a/b.png") == tmp_path / "a" / "b.png"
    assert inside(tmp_path, "a\\b.png") == tmp_path / "a" / "b.png"


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x.png", "a/../../x.png", "..\\x.png", "C:\\x.png", "", " ", None, 7, "a\0b"]
)
def test_names_that_lead_out(tmp_path, name):
    with pytest.raises(DataError, match="expected the name of a file"):
        inside(tmp_path, name)


@given(st.text(max_size=30))
def test_no_name_leads_out(name):
    folder = Path("/data/set")
    try:
        path = inside(folder, name)
    except DataError:
        return
    assert folder in path.resolve().parents or path.resolve() == folder
