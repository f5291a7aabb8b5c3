"""Grey values -> 8 bits: percentile windows, windows of a centre and a width, and the sizes nobody decodes."""

import numpy as np

from a3tune.errors import DataError, shown

MAX_PIXELS = 80_000_000
"""Larger images are refused before they are decoded: a few kilobytes can unpack to gigabytes (a decompression bomb)."""
WINDOW_PERCENTILES = (0.5, 99.5)
"""Grey values of more than 8 bits are scaled so that these percentiles become black and white; tails are clipped."""
CT_WINDOWS = {
    "brain": (40.0, 80.0),
    "mediastinum": (50.0, 350.0),
    "abdomen": (50.0, 400.0),
    "bone": (400.0, 1800.0),
    "lung": (-600.0, 1500.0),
}
"""Customary windows of CT by name: centre and width in Hounsfield units."""


def check_size(width: int, height: int) -> None:
    """Refuse an image by the size that its header claims.

    Raises:
        DataError: no pixel, or more than `MAX_PIXELS`.
    """
    if width * height > MAX_PIXELS:
        raise DataError(f"expected at most {MAX_PIXELS:,} pixels, got {width} x {height}; reduce the image first")
    if width * height == 0:
        raise DataError(f"expected at least one pixel, got {width} x {height}")


def window(values: np.ndarray) -> np.ndarray:
    """Scale grey values to uint8 by the 0.5-99.5 percentile range of the finite ones.

    If that range is a single value (a mask, a nearly empty image) the full range is used; a constant image becomes
    black. Infinities are clipped to the range, NaN becomes black. Any shape, any real dtype.

    Raises:
        DataError: no value is finite.
    """
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise DataError("expected finite pixel values, all are NaN or infinite")
    low, high = np.percentile(finite, WINDOW_PERCENTILES, overwrite_input=True)
    if low == high:
        low, high = finite.min(), finite.max()
    del finite  # half a gigabyte for a large image
    np.clip(values, low, high, out=values)
    values -= low
    values /= (high - low) or 1.0
    return _grey(values)


def centred_window(values: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Scale grey values to uint8 by a window of a centre and a width, in the values' own unit; NaN becomes black.

    `function` is DICOM's VOI LUT Function (PS3.3 C.11.2.1): LINEAR, LINEAR_EXACT or SIGMOID.

    Raises:
        DataError: it is no window (`is_window`).
    """
    if not is_window(centre, width, function):
        raise DataError(f"expected a window of {function:.20}, got the centre {centre} and the width {width}")
    values = values.astype(np.float64)
    if function == "SIGMOID":
        return _grey(1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700))))
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if width == 0:  # LINEAR's narrowest: a threshold
        return _grey(np.where(np.isnan(values), np.nan, values > centre))
    return _grey(np.clip((values - centre) / width + 0.5, 0, 1))


def is_window(centre: float, width: float, function: str) -> bool:
    """Whether a VOI LUT Function takes these: LINEAR a width of 1 and more, LINEAR_EXACT and SIGMOID any above 0."""
    narrowest = {"LINEAR": width >= 1, "LINEAR_EXACT": width > 0, "SIGMOID": width > 0}
    return bool(np.isfinite(centre) and np.isfinite(width) and narrowest.get(function, False))


def ct_window(name: str) -> tuple[float, float]:
    """Centre and width of a customary CT window.

    Raises:
        DataError: the name is unknown; lists the known ones.
    """
    if name not in CT_WINDOWS:
        raise DataError(f"window: expected one of {', '.join(CT_WINDOWS)}, got {shown(name, 40)}")
    return CT_WINDOWS[name]


def _grey(share: np.ndarray) -> np.ndarray:
    """Shares of white as uint8; in place where possible."""
    share *= 255
    return np.round(np.nan_to_num(share, copy=False), out=share).astype(np.uint8)
