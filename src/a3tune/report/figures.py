"""Numbers, masks and attention -> inline SVG.

Knows shapes and places, not words of the page: colours, fonts and dark mode are the business of `report.css`, through
classes (`m0`, `m1`, ... for the methods in their order, `line`, `grid`, ...). Charts are vectors, so they stay sharp at
any size and in print; the XML writer escapes all names.
"""

import base64
import io
import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from PIL import Image
from skimage.measure import find_contours

from a3tune.metrics.stats import Estimate
from a3tune.report.records import Curve
from a3tune.vlm.heat import heat_colours

_POINTS = 60
"""A curve with more points is shown as means of neighbouring ones."""
_LARGEST = 640
"""Longest side of an embedded image, in pixels: otherwise a page of X-rays would weigh tens of megabytes."""
_SHARP = 256
"""Up to this side an image is magnified without blur."""
_WIDTH = 340
"""Of a chart, in CSS pixels: one column of a phone."""


def scan_definition(image: np.ndarray, name: str) -> Markup:
    """A scan that the panels of one case share: an invisible SVG that defines it under the id `name`."""
    height, width = image.shape[:2]
    root = Element("svg", {"width": "0", "height": "0", "aria-hidden": "true", "class": "hidden"})
    _picture(SubElement(root, "defs"), np.asarray(image, dtype=np.uint8), width, height, id=name)
    return _markup(root)


def case_panel(
    scan: str,
    size: tuple[int, int],
    alt: str,
    *,
    heat: np.ndarray | None = None,
    region: np.ndarray | None = None,
    labels: Sequence[np.ndarray] = (),
) -> Markup:
    """The scan defined as `scan`, of `size` (height, width), with what is given laid over it.

    Args:
        heat: attention float [H, W].
        region: bool [H, W], outlined by a solid line.
        labels: bool [H, W] each, outlined by dashed lines and numbered from 1.
    """
    height, width = size
    root = _svg(width, height, alt, "panel")
    SubElement(root, "use", {"href": f"#{scan}"})
    if heat is not None:
        _picture(root, heat_colours(heat), width, height)
    for number, label in enumerate(labels, 1):
        _outline(root, label, "weak")
        rows, columns = np.nonzero(label)
        if len(rows):
            # Below the top edge of the label, so that nested labels keep their numbers apart.
            top = int(rows.min())
            x = float(columns[rows == top].mean()) + 0.5
            attributes = {"x": _n(x), "y": _n(top + 0.5), "class": "number", "font-size": _n(0.06 * height)}
            SubElement(root, "text", attributes).text = str(number)
    if region is not None:
        _outline(root, region, "region")
    return _markup(root)


def outline(mask: np.ndarray) -> str:
    """SVG path data of the outline of a mask bool [H, W], in pixels of the image; empty for an empty mask."""
    # The border keeps the outlines of masks at the image's edge closed; pixel (0, 0) has its centre at (.5, .5).
    contours = find_contours(np.pad(mask, 1).astype(np.float32), 0.5)
    return "".join(
        "M" + "L".join(f"{_n(x - 0.5)} {_n(y - 0.5)}" for y, x in contour[:-1]) + "Z" for contour in contours
    )


def interval_chart(
    rows: Sequence[tuple[str, Estimate]], alt: str, *, scale: float = 1.0, baseline: float | None = None
) -> Markup:
    """Means as dots and their intervals as whiskers, one row for each (title, estimate); `baseline` is a dashed line.

    Values are multiplied by `scale`. A row without a value keeps its place.
    """
    left, right, top, step = 140, 12, 6, 25
    height = top + step * len(rows) + 24
    root = _svg(_WIDTH, height, alt, "chart")
    ends = [scale * v for _, e in rows for v in (e.low, e.mean, e.high) if math.isfinite(v)]
    ends += [] if baseline is None else [scale * baseline]
    axis = _Axis(ends, left, _WIDTH - right)
    bottom = top + step * len(rows)
    _x_axis(root, axis, top, bottom)
    if baseline is not None:
        x = axis(scale * baseline)
        _line(root, x, top, x, bottom, "baseline")
    for slot, (title, estimate) in enumerate(rows):
        y = top + step * (slot + 0.5)
        _text(root, 0, y + 4, title if len(title) <= 21 else title[:20] + "…", "label")
        if not math.isfinite(estimate.mean):
            continue
        if math.isfinite(estimate.low):
            _line(root, axis(scale * estimate.low), y, axis(scale * estimate.high), y, f"whisker m{slot}")
        _mark(root, axis(scale * estimate.mean), y, slot)
    return _markup(root)


def curve_chart(
    curves: Sequence[tuple[int, Curve]],
    alt: str,
    *,
    across: str = "optimiser steps",
    thin: Sequence[Curve] = (),
) -> Markup:
    """Values over steps, one line for each (slot of the method, curve); `thin` are what they are compared with."""
    height, left, right, top, bottom = 196, 44, 10, 8, 164
    root = _svg(_WIDTH, height, alt, "chart")
    thinned = [*((f"line m{slot}", _thin(curve)) for slot, curve in curves)]
    thinned += [("line thin", _thin(curve)) for curve in thin]
    along = _Axis([float(v) for _, c in thinned for v in (0, c.steps[-1])], left, _WIDTH - right)
    up = _Axis([float(v) for _, c in thinned for v in (c.values.min(), c.values.max())], bottom, top)
    for tick in up.ticks:
        _line(root, left, up(tick), _WIDTH - right, up(tick), "grid")
        _text(root, left - 7, up(tick) + 4, _tick(tick), "tick end")
    for tick in along.ticks:
        _text(root, along(tick), bottom + 15, _tick(tick), "tick middle")
    _text(root, (left + _WIDTH - right) / 2, height - 2, across, "tick middle")
    for kind, curve in thinned:
        points = zip(curve.steps, curve.values, strict=True)
        path = " ".join(f"{_n(along(x))},{_n(up(y))}" for x, y in points)
        SubElement(root, "polyline", {"points": path, "class": kind})
    return _markup(root)


def group_chart(groups: Sequence[tuple[str, Sequence[Estimate | None]]], alt: str) -> Markup:
    """Shares as bars with their intervals: for each group a bar for every method, in their order; None has none."""
    height, left, right, top, bottom = 176, 44, 10, 10, 150
    root = _svg(_WIDTH, height, alt, "chart")
    known = [estimate for _, estimates in groups for estimate in estimates if estimate is not None]
    up = _Axis([0.0, *(v for e in known for v in (e.low, e.mean, e.high))], bottom, top)
    for tick in up.ticks:
        _line(root, left, up(tick), _WIDTH - right, up(tick), "grid")
        _text(root, left - 7, up(tick) + 4, f"{_tick(100 * tick)} %", "tick end")
    step = (_WIDTH - left - right) / len(groups)
    for group, (title, estimates) in enumerate(groups):
        _text(root, left + step * (group + 0.5), bottom + 17, title, "tick middle")
        wide = 0.8 * step / len(estimates)
        for slot, estimate in enumerate(estimates):
            if estimate is None or not math.isfinite(estimate.mean):
                continue
            x, y = left + step * (group + 0.1) + wide * slot, up(estimate.mean)
            box = {"x": _n(x + 1), "y": _n(y), "width": _n(wide - 2), "height": _n(up(0.0) - y)}
            SubElement(root, "rect", {**box, "class": f"bar m{slot}"})
            if math.isfinite(estimate.low):
                _line(root, x + wide / 2, up(estimate.low), x + wide / 2, up(estimate.high), "error")
    return _markup(root)


def bar_chart(use: Sequence[float], slot: int, alt: str) -> Markup:
    """The share of each expert as bars, in the colour of a method; the dashed line is even use."""
    height, left, right, top, bottom = 150, 44, 10, 16, 126
    root = _svg(_WIDTH, height, alt, "chart")
    up = _Axis([0.0, *use], bottom, top)
    for tick in up.ticks:
        _line(root, left, up(tick), _WIDTH - right, up(tick), "grid")
        _text(root, left - 7, up(tick) + 4, f"{100 * tick:.0f} %", "tick end")
    step = (_WIDTH - left - right) / len(use)
    for index, value in enumerate(use):
        x, y = left + step * (index + 0.16), up(value)
        box = {"x": _n(x), "y": _n(y), "width": _n(0.68 * step), "height": _n(bottom - y), "class": f"bar m{slot}"}
        SubElement(root, "rect", box)
        _text(root, left + step * (index + 0.5), bottom + 15, str(index + 1), "tick middle")
    _line(root, left, up(1 / len(use)), _WIDTH - right, up(1 / len(use)), "baseline")
    return _markup(root)


def head_grid(share_LH: np.ndarray, slot: int, alt: str) -> Markup:
    """How often each head was selected, float [L, H] in [0, 1]: one row per layer, counted from 1."""
    layers, heads = share_LH.shape
    left, top = 34, 20
    cell = min(44.0, (_WIDTH - left) / heads)
    tall = min(cell, 30.0)
    root = _svg(_WIDTH, math.ceil(top + tall * layers + 2), alt, "chart")
    every = max(1, math.ceil(heads / 12))
    for head in range(0, heads, every):
        _text(root, left + cell * (head + 0.5), top - 6, str(head + 1), "tick middle")
    for layer in range(layers):
        if layer % every == 0:
            _text(root, left - 7, top + tall * (layer + 0.5) + 4, str(layer + 1), "tick end")
        for head in range(heads):
            _head(root, left + cell * head, top + tall * layer, (cell, tall), float(share_LH[layer, head]), slot)
    return _markup(root)


def method_key(slot: int) -> Markup:
    """The line and mark by which the charts show a method; decoration beside its name."""
    root = Element("svg", {"viewBox": "0 0 30 14", "aria-hidden": "true", "class": "key"})
    _line(root, 1, 7, 29, 7, f"line m{slot}")
    _mark(root, 15, 7, slot)
    return _markup(root)


class _Axis:
    """Values -> pixels: rounded ends, a few round ticks. Without a finite value it spans 0 to 1."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        if low == high:
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        self.ticks = [float(t) for t in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
        self._low, self._high = self.ticks[0], self.ticks[-1]
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)


def _thin(curve: Curve) -> Curve:
    """Means of neighbouring points, so that at most `_POINTS` are left; values that are not finite are dropped."""
    finite = np.isfinite(curve.values)
    steps, values = curve.steps[finite], curve.values[finite]
    if not len(steps):
        return Curve(np.zeros(1, dtype=np.int64), np.zeros(1))
    parts = np.array_split(np.arange(len(steps)), min(_POINTS, len(steps)))
    return Curve(np.array([steps[p].mean() for p in parts]), np.array([values[p].mean() for p in parts]))


def _head(root: Element, x: float, y: float, size: tuple[float, float], share: float, slot: int) -> None:
    width, height = size
    gap = 1.5 if width > 14 else 0.5
    box = {"x": _n(x + gap), "y": _n(y + gap), "width": _n(width - 2 * gap), "height": _n(height - 2 * gap), "rx": "2"}
    SubElement(root, "rect", {**box, "class": "cell"})
    SubElement(root, "rect", {**box, "class": f"bar m{slot}", "fill-opacity": _n(share)})
    if width >= 28:
        _text(root, x + width / 2, y + height / 2 + 4, f"{100 * share:.0f}", "tick middle" + " on" * (share > 0.55))


def _mark(root: Element, x: float, y: float, slot: int) -> None:
    """A different shape for each method, so that colour is never alone: circle, square, diamond, triangle."""
    kind = slot % 4
    attributes = {"class": f"dot m{slot}"}
    if kind == 0:
        SubElement(root, "circle", {**attributes, "cx": _n(x), "cy": _n(y), "r": "5"})
        return
    corners = {
        1: ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
        2: ((0, -6), (6, 0), (0, 6), (-6, 0)),
        3: ((0, -5.5), (5.5, 4.5), (-5.5, 4.5)),
    }[kind]
    points = " ".join(f"{_n(x + dx)},{_n(y + dy)}" for dx, dy in corners)
    SubElement(root, "polygon", {**attributes, "points": points})


def _x_axis(root: Element, axis: _Axis, top: float, bottom: float) -> None:
    for tick in axis.ticks:
        _line(root, axis(tick), top, axis(tick), bottom, "grid")
        _text(root, axis(tick), bottom + 16, _tick(tick), "tick middle")


def _outline(root: Element, mask: np.ndarray, kind: str) -> None:
    """Drawn twice: a dark line below a bright one can be seen on black, grey and white."""
    path = outline(mask)
    SubElement(root, "path", {"d": path, "class": "halo"})
    SubElement(root, "path", {"d": path, "class": kind})


def _picture(parent: Element, pixels: np.ndarray, width: int, height: int, **attributes: str) -> None:
    """A picture over `width` x `height` of the drawing; large images are made smaller, small ones keep sharp pixels."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((_LARGEST, _LARGEST))
    image.save(file, "PNG", optimize=True)
    if max(pixels.shape) <= _SHARP:
        attributes["class"] = "sharp"
    href = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    SubElement(parent, "image", {"href": href, "width": str(width), "height": str(height), **attributes})


def _svg(width: float, height: float, alt: str, kind: str) -> Element:
    return Element("svg", {"viewBox": f"0 0 {_n(width)} {_n(height)}", "role": "img", "aria-label": alt, "class": kind})


def _line(parent: Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    SubElement(parent, "line", {"x1": _n(x1), "y1": _n(y1), "x2": _n(x2), "y2": _n(y2), "class": kind})


def _text(parent: Element, x: float, y: float, text: str, kind: str) -> None:
    SubElement(parent, "text", {"x": _n(x), "y": _n(y), "class": kind}).text = text


def _markup(root: Element) -> Markup:
    return Markup(tostring(root, encoding="unicode", short_empty_elements=False))


def _tick(value: float) -> str:
    return f"{round(value, 10):g}".replace("-", "\N{MINUS SIGN}")


def _n(value: float) -> str:
    """A coordinate in at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
