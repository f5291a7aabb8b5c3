"""How the benchmarks measure: sides in turns, processor time beside wall time, one process per side for memory.

Knows no model. Wall time on a shared machine is noisy; processor time is less so, and instructions hardly at all, where
the machine counts them (`perf_event_open`; most virtual machines do not).
"""

import ctypes
import json
import os
import platform
import shlex
import statistics
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch

_SYSCALL = {"x86_64": 298, "aarch64": 241}
_INSTRUCTIONS = 1
"""PERF_COUNT_HW_INSTRUCTIONS, of type 0 (hardware)."""
_FLAGS = 1 << 1 | 1 << 5 | 1 << 6
"""inherit (threads made later count too), exclude_kernel, exclude_hv."""


_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's mallopt."""


@dataclass(frozen=True)
class Cost:
    """What one call took."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of processor time, all threads."""
    instructions: float | None
    """User instructions of this thread and those it started; None where the machine does not count them."""


@dataclass(frozen=True)
class Spread:
    """Median and extremes over repetitions."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g} to {self.most:.3g})"


def take_turns(
    sides: Mapping[str, Callable[[], Any]], repetitions: int, warmups: int = 1
) -> dict[str, dict[str, Spread]]:
    """Costs of each side: `{side: {"wall" | "cpu" | "instructions": Spread}}`.

    The sides take turns, so that a neighbour's load hits all alike; every other round goes backwards.
    """
    counter = _Instructions()
    names = list(sides)
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for round_ in range(-warmups, repetitions):
        for name in names if round_ % 2 == 0 else reversed(names):
            cost = counter.cost(sides[name])
            if round_ >= 0:
                costs[name].append(cost)
    return {name: _spreads(own) for name, own in costs.items()}


def peak_memory(make: Callable[..., Callable[[], Any]], *args: Any) -> tuple[int, int]:
    """Bytes of resident memory before and at the peak of the call that `make(*args)` returns, in a process of its own.

    `make` must be importable. With one thread the process is a fork, which is quick but starts with what the caller
    holds; with more it begins anew, because a fork loses the threads that torch counts on.
    """
    start = "fork" if torch.get_num_threads() == 1 else "spawn"
    with ProcessPoolExecutor(1, mp_context=get_context(start)) as pool:
        return pool.submit(_peak, make, args, torch.get_num_threads()).result()


def about() -> dict[str, str]:
    """The command, and what it ran on."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "torch": torch.__version__,
        "instructions": "counted" if _Instructions().file is not None else "not counted: no counter on this machine",
    }


def write(out: Path | None, record: Mapping[str, Any], markdown: str) -> None:
    """Print the Markdown; with `out`, a path without suffix, leave `out.json` and `out.md`."""
    print(markdown)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(record, indent=1, default=asdict) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(markdown + "\n", encoding="utf-8")


def listed(facts: Mapping[str, object]) -> list[str]:
    """Lines of a Markdown list, one for each fact."""
    return [f"- {name}: {value}" for name, value in facts.items()]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


class _Instructions:
    """The processor's counter of this thread's user instructions, where there is one."""

    def __init__(self) -> None:
        self.file: int | None = None
        number = _SYSCALL.get(platform.machine())
        if sys.platform != "linux" or number is None:
            return
        # struct perf_event_attr: type, size, config, then the flags at byte 40.
        attributes = struct.pack("IIQ", 0, 112, _INSTRUCTIONS).ljust(40, b"\0") + struct.pack("Q", _FLAGS)
        buffer = ctypes.create_string_buffer(attributes, 112)
        file = ctypes.CDLL(None).syscall(number, buffer, 0, -1, -1, 0)
        self.file = file if file >= 0 else None

    def cost(self, call: Callable[[], Any]) -> Cost:
        counted, wall, cpu = self._read(), time.perf_counter(), time.process_time()
        call()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Cost(wall, cpu, None if counted is None else (self._read() or 0) - counted)

    def _read(self) -> int | None:
        return None if self.file is None else int.from_bytes(os.read(self.file, 8), sys.byteorder)


def _spreads(costs: Sequence[Cost]) -> dict[str, Spread]:
    columns = {field.name: [getattr(cost, field.name) for cost in costs] for field in fields(Cost)}
    return {name: Spread.of(values) for name, values in columns.items() if values and None not in values}


def _peak(make: Callable[..., Callable[[], Any]], args: tuple, threads: int) -> tuple[int, int]:
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # Blocks from 64 kB on go back to the system when freed, so that the peak is that of what lives.
        libc.mallopt(_MMAP_THRESHOLD, 65536)
    call = make(*args)
    before = _resident()
    call()
    return before, _most_resident()


def _resident() -> int:
    """Bytes in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _most_resident() -> int:
    """Bytes in memory at the most. On Linux not `ru_maxrss`: in a process that began anew it starts at its parent's."""
    if sys.platform == "darwin":
        return getrusage(RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
