"""Colours over a scan say what they should."""

import numpy as np

from a3tune.vlm.heat import heat_colours, overlay


def test_heat_is_transparent_without_attention_and_brightest_at_the_maximum() -> None:
    heat = np.array([[0.0, 0.1, 0.2, 0.4]])
    rgba = heat_colours(heat).astype(int)
    assert rgba.shape == (1, 4, 4)
    assert rgba[0, 0, 3] == 0
    assert (np.diff(rgba[0, :, 3]) > 0).all()
    luminance = rgba[0, :, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0).all()
    np.testing.assert_array_equal(rgba, heat_colours(7 * heat))


def test_overlay_keeps_the_scan_where_nothing_is_looked_at() -> None:
    scan = np.full((4, 4), 90, dtype=np.uint8)
    heat = np.zeros((4, 4))
    assert np.asarray(overlay(scan, heat)).tolist() == np.full((4, 4, 3), 90).tolist()
    heat[1, 2] = 1
    changed = (np.asarray(overlay(np.stack([scan] * 3, axis=2), heat)) != 90).any(-1)
    assert np.argwhere(changed).tolist() == [[1, 2]]
