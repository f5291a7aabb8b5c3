"""Charts and overlays: right geometry, well-formed and escaped SVG, colours that say what they should."""

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from matplotlib.path import Path as Polygon
from PIL import Image

from a3tune.metrics.stats import Estimate
from a3tune.report import figures
from a3tune.report.records import Curve

NAN = float("nan")
EVIL = '"><script>alert(1)</script>&'


def _inside(path: str, height: int, width: int) -> np.ndarray:
    """Fill the outline by the even-odd rule and look at the pixels' centres."""
    y, x = np.mgrid[:height, :width] + 0.5
    centres = np.stack([x.ravel(), y.ravel()], axis=1)
    inside = np.zeros(height * width, dtype=bool)
    for part in filter(None, path.split("M")):
        corners = np.array([[float(v) for v in point.split()] for point in part.rstrip("Z").split("L")])
        inside ^= Polygon(corners).contains_points(centres)
    return inside.reshape(height, width)


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_outline_encloses_exactly_the_pixels_of_the_mask(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(_inside(figures.outline(mask), *mask.shape), mask)


def test_panel_lays_labels_and_region_over_the_shared_scan() -> None:
    region, label = np.zeros((2, 12, 10), dtype=bool)
    region[2:5, 2:5], label[6:9, 3:8] = True, True
    panel = ElementTree.fromstring(
        figures.case_panel("scan-1", (12, 10), EVIL, heat=np.ones((12, 10)), region=region, labels=[label, label[::-1]])
    )
    assert panel.get("viewBox") == "0 0 10 12"
    assert panel.get("aria-label") == EVIL
    assert [use.get("href") for use in panel.iter("use")] == ["#scan-1"]
    assert [text.text for text in panel.iter("text")] == ["1", "2"]
    assert [path.get("class") for path in panel.iter("path")] == ["halo", "weak"] * 2 + ["halo", "region"]


@pytest.mark.parametrize("shape", [(40, 30), (40, 30, 3)])
def test_scan_is_embedded_losslessly(shape: tuple[int, ...]) -> None:
    scan = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = next(ElementTree.fromstring(figures.scan_definition(scan, "scan-3")).iter("image"))
    assert image.get("id") == "scan-3" and image.get("class") == "sharp"
    data = base64.b64decode(str(image.get("href")).removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), scan)


def test_large_scan_is_made_smaller_in_its_own_frame() -> None:
    image = next(ElementTree.fromstring(figures.scan_definition(np.zeros((1500, 2000), np.uint8), "x")).iter("image"))
    data = base64.b64decode(str(image.get("href")).partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (640, 480)
    assert (image.get("width"), image.get("height"), image.get("class")) == ("2000", "1500", None)


def test_intervals_are_drawn_to_scale() -> None:
    rows = [("a", Estimate(0.2, 0.1, 0.3, 9)), (EVIL, Estimate(0.6, 0.5, 0.7, 9)), ("none", Estimate(NAN, NAN, NAN, 0))]
    chart = ElementTree.fromstring(figures.interval_chart(rows, "alt", scale=100, baseline=0.4))
    whiskers = [line for line in chart.iter("line") if str(line.get("class")).startswith("whisker")]
    ends = [(float(line.get("x1", 0)), float(line.get("x2", 0))) for line in whiskers]
    assert len(ends) == 2
    assert ends[0][1] - ends[0][0] == pytest.approx(ends[1][1] - ends[1][0], abs=0.05)
    baseline = next(line for line in chart.iter("line") if line.get("class") == "baseline")
    assert float(baseline.get("x1", 0)) == pytest.approx((ends[0][1] + ends[1][0]) / 2, abs=0.05)
    assert "none" in [text.text for text in chart.iter("text")]


def test_one_group_without_an_interval_still_has_its_dot() -> None:
    svg = figures.interval_chart([("only", Estimate(0.5, NAN, NAN, 1))], "alt")
    assert "whisker" not in svg and 'class="dot m0"' in svg and "nan" not in svg


def test_curve_is_thinned_to_means_and_keeps_its_ends() -> None:
    steps = np.arange(1000)
    chart = ElementTree.fromstring(figures.curve_chart([(2, Curve(steps, steps / 1000))], "alt"))
    line = next(chart.iter("polyline"))
    points = [tuple(map(float, point.split(","))) for point in str(line.get("points")).split()]
    assert line.get("class") == "line m2" and 10 < len(points) <= 100
    x, y = np.array(points).T
    assert (np.diff(x) > 0).all() and (np.diff(y) < 0).all()


@pytest.mark.parametrize("values", [[NAN, NAN], [1.0, 1.0], [0.0, 0.0], [-2.0, NAN], [float("inf"), 1.0]])
def test_curve_survives_odd_values(values: list[float]) -> None:
    svg = figures.curve_chart([(0, Curve(np.array([1, 2]), np.array(values)))], "alt")
    assert not re.search(r"nan|inf", svg)


def test_bars_have_heights_in_proportion() -> None:
    chart = ElementTree.fromstring(figures.bar_chart([0.5, 0.25, 0.25], 1, "alt"))
    heights = [float(bar.get("height", 0)) for bar in chart.iter("rect")]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.05) and heights[1] == heights[2]


@pytest.mark.parametrize("shape", [(2, 3), (32, 32)])
def test_head_grid_has_a_cell_per_head(shape: tuple[int, int]) -> None:
    share = np.linspace(0, 1, shape[0] * shape[1]).reshape(shape)
    chart = ElementTree.fromstring(figures.head_grid(share, 0, "alt"))
    shades = [float(cell.get("fill-opacity", 0)) for cell in chart.iter("rect") if cell.get("class") == "bar m0"]
    np.testing.assert_allclose(shades, share.ravel(), atol=0.006)
