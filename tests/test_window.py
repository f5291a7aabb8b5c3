import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a3tune.data.window import CT_WINDOWS, MAX_PIXELS, centred_window, check_size, ct_window
from a3tune.errors import DataError


@pytest.mark.parametrize(
    ("function", "grey"),
    [
        # PS3.3 C.11.2.1.2.1: x <= c - .5 - (w-1)/2 is black, x > c - .5 + (w-1)/2 is white.
        ("LINEAR", [0, 0, 127, 128, 255, 255]),
        ("LINEAR_EXACT", [0, 0, 127, 128, 255, 255]),
        ("SIGMOID", [0, 30, 127, 128, 225, 255]),
    ],
)
def test_a_window_of_a_centre_and_a_width(function, grey):
    values = np.array([-9000, -160, 39.5, 40.5, 240, 9000])
    assert np.abs(centred_window(values, 40, 400, function).astype(int) - grey).max() <= 1


def test_linear_is_linear_exact_half_a_value_lower():
    values = np.arange(0, 101)
    assert centred_window(values, 50, 101).tolist() == [
        round(255 * (value + 0.5) / 100) if value < 100 else 255 for value in values
    ]


@settings(deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(2, 1e4), st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]))
def test_windows_never_turn_the_order_of_values_round(centre, width, function):
    grey = centred_window(np.linspace(-2e4, 2e4, 999), centre, width, function)
    assert (np.diff(grey.astype(int)) >= 0).all()


def test_nan_is_black():
    assert centred_window(np.array([np.nan, np.inf, -np.inf]), 0, 10).tolist() == [0, 255, 0]


@pytest.mark.parametrize(
    ("centre", "width", "function"),
    [
        (0, 0, "LINEAR"),
        (0, 0.5, "LINEAR"),
        (0, 0, "LINEAR_EXACT"),
        (0, -5, "SIGMOID"),
        (0, float("nan"), "LINEAR"),
        (0, 9, "CURVE"),
    ],
)
def test_windows_that_are_none(centre, width, function):
    with pytest.raises(DataError, match="expected"):
        centred_window(np.zeros(3), centre, width, function)


def test_windows_have_names():
    assert ct_window("lung") == CT_WINDOWS["lung"]
    with pytest.raises(DataError, match="brain, mediastinum, abdomen, bone, lung"):
        ct_window("lungs")


def test_sizes_that_are_refused():
    check_size(MAX_PIXELS, 1)
    with pytest.raises(DataError, match="at most"):
        check_size(MAX_PIXELS, 2)
    with pytest.raises(DataError, match="at least one pixel"):
        check_size(0, 2)
