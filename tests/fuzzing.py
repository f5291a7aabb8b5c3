"""Damage for the fuzz tests: bytes and JSON near valid ones, and the oracle that any reader must satisfy.

A reader may take what it is given or refuse it with one of `a3tune.errors`, and it must do so soon. Everything else, a
warning included, is a bug. How much memory it takes is measured in `test_fuzz_memory.py`.
"""

import copy
import faulthandler
import json
import os
import signal
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from a3tune.errors import A3TuneError

SECONDS = 10
"""Longest time for one damaged file; a whole one takes milliseconds."""
fuzz = settings(
    max_examples=int(os.environ.get("A3TUNE_FUZZ_EXAMPLES", "50")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
"""Of every fuzz test; `benchmarks/fuzz.py` asks for more examples."""

_NUMBERS = [
    struct.pack(order + code, value)
    for order in "<>"
    for code, values in {
        "H": (0, 1, 0x7FFF, 0x8000, 0xFFFF),
        "I": (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x00010000),
        "Q": (0, 2**63, 2**64 - 1),
        "f": (float("nan"), float("inf"), -1.0, 1e38, 0.0),
        "d": (float("nan"), 1e308),
    }.items()
    for value in values
]
_STRANGE_TEXTS = ["", " ", "\0", "a\0b", "../../etc/passwd", "/etc/passwd", "C:\\x", ".", "..", "http://[", "\ud800"]
_STRANGE_TEXTS += ["file:///etc/passwd", "x" * 5000, "\x1b]0;x\a", "1e999", "NaN", "9" * 5000, "٣", "=1+1", "<script>"]
_TEXTS = st.sampled_from(_STRANGE_TEXTS)
_LEAVES = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(10**400), 1e308, -0.0, float("nan"), float("inf")])
    | st.integers(-5, 300)
    | st.floats()
    | _TEXTS
    | st.text(max_size=5)
)
JSON = st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=3))
"""Whatever JSON can hold, and more: Python's reader takes NaN too."""


def lines(rows: Sequence[Any]) -> bytes:
    """JSON lines."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@contextmanager
def only_our_errors() -> Iterator[None]:
    """Passes where the block ends well or with an `A3TuneError`; fails with anything else, and after `SECONDS`."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # where C code does not come back to Python
    try:
        yield
    except A3TuneError as error:
        assert str(error).strip()
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds with up to six places overwritten, cut out, doubled, put in, or with its end cut off."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("flip", "number", "insert", "delete", "double", "cut")))
        length = draw(st.integers(1, 64))
        if kind == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "number":
            value = draw(st.sampled_from(_NUMBERS))
            data[at : at + len(value)] = value
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=32))
        elif kind == "delete":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "cut":
            del data[at:]
    return bytes(data)


@st.composite
def altered(draw: st.DrawFn, seeds: Sequence[Any]) -> Any:
    """One of the JSON values with up to three of its parts replaced or taken away, at any depth."""
    value = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        if draw(st.integers(0, 4)):
            holder[key] = draw(JSON)
        else:
            del holder[key]
    return value if draw(st.integers(0, 9)) else draw(JSON)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Holder and key or index of every part of a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])
