from hypothesis import given
from hypothesis import strategies as st

from a3tune.errors import is_data_uri, shown

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON, st.integers(20, 200))
def test_a_message_quotes_no_more_than_asked(value, most):
    assert len(shown(value, most)) <= most


def test_short_values_are_quoted_as_python_writes_them():
    for value in (7, None, [300], {"a": 1}, "left lung", "Ø", [1, "x"]):
        assert shown(value) == repr(value)
    assert shown("x" * 100) == repr("x" * 100)[:57] + "..."
    assert shown(list(range(100))) == "[0, 1, 2, 3, 4, 5, ...]"


def test_no_pixels_are_quoted():
    pixels = "iVBORw0KGgoAAAANSUhEUgAAAIAAAABgCAIAAAB" * 99
    uri = f"data:image/png;base64,{pixels}"
    for value in (
        uri,
        uri.upper(),
        [uri],
        {"image": uri},
        pixels,
        b"\x89PNG" * 20,
        {"bytes": b"\x89PNG", "path": None},
    ):
        assert "iVBOR" not in shown(value, 200) and "PNG" not in shown(value, 200).replace("IMAGE/PNG", "")
    assert shown(uri) == f"<data URI of {len(uri):,} characters>"
    assert shown(b"1234") == "<4 bytes>"
    assert is_data_uri(uri) and not is_data_uri("data/a.png")
