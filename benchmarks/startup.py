"""How long the package and its commands take to be there.

    python benchmarks/startup.py [--quick] [--out FILE]

Each in a Python process of its own, in turns, and so is every mistake of `tests/mistakes.py` until it is told.
Processor time is that of the process, user and system. A module's share is its own import time
(`python -X importtime`), without those that it imports.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

from measure import Spread, about, listed, table, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from mistakes import MISTAKES, NO_HUB, scene

MAIN = "from a3tune.cli import main; main()"
Calls = dict[str, tuple[list[str], float | None]]
CALLS: Calls = {
    "python -c pass": (["pass"], None),
    "import a3tune": (["import a3tune"], 0.3),
    "a3tune --help": ([MAIN, "--help"], 0.5),
    "a3tune train --help": ([MAIN, "train", "--help"], None),
    "a3tune train --dry-run": ([MAIN, "train", "--dry-run"], None),
    "a3tune demo --dry-run": ([MAIN, "demo", "--dry-run"], None),
}
"""Name -> what Python runs, and the aim in seconds."""
WORKING: Calls = {"import a3tune.commands.train": (["import a3tune.commands.train"], None)}
"""What every command waits for that computes: PyTorch, transformers, peft."""
TOLD = 1.0
"""Aim for every mistake, in seconds of processor time."""
QUICK = 3
"""Mistakes that are made in a hurry."""
TRACED = "a3tune --help"


def measure(calls: Calls, repeats: int) -> dict[str, dict[str, Spread]]:
    """`{call: {"wall" | "cpu": Spread}}`. Unless there is but one, a round before compiles what is not compiled yet."""
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in calls}
    for round_ in range(-1 if repeats > 1 else 0, repeats):
        for name, (arguments, _) in calls.items():
            wall, cpu = time.perf_counter(), _children()
            _run(arguments)
            if round_ >= 0:
                found[name]["wall"].append(time.perf_counter() - wall)
                found[name]["cpu"].append(_children() - cpu)
    return {name: {kind: Spread.of(values) for kind, values in own.items()} for name, own in found.items()}


def told(repeats: int, most: int | None = None) -> dict[str, Spread]:
    """Processor time until each mistake is told, by what is wrong."""
    found: dict[str, list[float]] = {name: [] for name in list(MISTAKES)[:most]}
    with tempfile.TemporaryDirectory() as folder:
        scene(Path(folder))
        for _ in range(repeats):
            for name, own in found.items():
                before = _children()
                call = [sys.executable, "-c", MAIN, *MISTAKES[name][0]]
                subprocess.run(call, cwd=folder, capture_output=True, env=os.environ | NO_HUB)
                own.append(_children() - before)
    return {name: Spread.of(values) for name, values in found.items()}


def packages(arguments: Sequence[str]) -> dict[str, float]:
    """Seconds of import by package, longest first."""
    found: defaultdict[str, float] = defaultdict(float)
    for line in _run(arguments, "-X", "importtime").splitlines():
        parts = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and parts[0].strip().isdecimal():
            found[parts[2].strip().partition(".")[0]] += int(parts[0]) / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _run(arguments: Sequence[str], *options: str) -> str:
    """Standard error of a Python process in an empty folder."""
    code, *rest = arguments
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *options, "-c", code, *rest], cwd=folder, capture_output=True, text=True, check=True
        )
    return done.stderr


def _children() -> float:
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the light calls once each, to see that it works")
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    args = parser.parse_args()
    calls = CALLS if args.quick else CALLS | WORKING
    times = measure(CALLS, 1 if args.quick else 7) | ({} if args.quick else measure(WORKING, 3))
    mistakes = told(1, QUICK) if args.quick else told(3)
    slowest = list(packages(CALLS[TRACED][0]).items())[:8]
    rows = [
        [f"`{name}`", own["cpu"], own["wall"], "" if aim is None else f"{aim} ({_verdict(own['cpu'], aim)})"]
        for (name, own), (_, aim) in zip(times.items(), calls.values(), strict=True)
    ]
    lines = listed(about())
    text = [
        "# Start-up",
        "\n".join(lines),
        "Seconds, medians with the extremes in brackets.",
        table(["Call", "Processor time", "Wall time", "Aim"], rows),
        "Until a mistake is told, in seconds of processor time:",
        table(
            ["What is wrong", "Command", "Processor time", "Aim"],
            [
                [name, f"`a3tune {' '.join(MISTAKES[name][0])}`", spent, f"{TOLD} ({_verdict(spent, TOLD)})"]
                for name, spent in mistakes.items()
            ],
        ),
        f"Import time of `{TRACED}` by package, ms: "
        + ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in slowest)
        + ".",
    ]
    write(
        args.out,
        {"about": about(), "seconds": times, "mistakes": mistakes, "imports": dict(slowest)},
        "\n\n".join(text),
    )


def _verdict(spread: Spread, aim: float) -> str:
    return "met" if spread.median < aim else "not met"


if __name__ == "__main__":
    main()
