"""Kills commands at every moment, fills their disk, and sees whether the same command then ends as undisturbed.

    python benchmarks/faults.py [--quick] [--minutes 10] [--jobs 4]

Commands run on a few small images, in forked processes that begin their work at once. Faults strike at each change that
a command makes to its files (`tests/injection.py`), at random times, to one process or to all of a command's, and, as
root, on a small disk that is full. Writes docs/results/faults.json and faults.md. All faults take some 50 minutes of
one processor; `--minutes` takes a seeded choice of them, but for signals to all processes, which are all tried. Fails
if one leaves something wrong. Bits: `damage.py`.
"""

import argparse
import json
import math
import platform
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from injection import MAIN, OTHERS, PARALLEL, Fault, Faults, Room, Signal, Trial, World, writes  # noqa: E402

RANDOM_KILLS = 8
"""Kills at a random time, of each command."""
GROUP_SIGNALS = 30
"""Signals of each kind to all processes of a command, likewise."""
ROOMS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
"""Free space on the full disk, as a share of what the command leaves."""
DISK = 32 * 2**20
"""Bytes of the file system that gets full."""
TITLES = {
    "kill": "killed before each change",
    "tear": "killed in the middle of each write",
    "repeatedly": "killed three times, at random changes",
    "random": "killed at a random time",
    "group-kill": "all its processes killed at a random time (SIGKILL)",
    "group-stop": "all its processes told to stop at a random time (SIGTERM)",
    "full": "no space from each write on",
    "short": "no space in the middle of each write",
    "read-only": "read-only folder",
    "disk": "file system full",
}
GROUP = {"group-kill": signal.SIGKILL, "group-stop": signal.SIGTERM}
PAGE = """# Results of `benchmarks/faults.py`

Each row: one command, one kind of fault. *Struck*: the fault, or all three, came before the command was done.
*As undisturbed*: run again without a fault, the command left the same files with the same bytes as one that was never
disturbed, but for times and the lock file, and no others.

- command: `{command}`
- machine: {machine}, Python {python}, torch {torch}, transformers {transformers}, one thread
- {seconds:.0f} s

| Command | Fault | Possible | Tried | Struck | As undisturbed |
|---|---|---|---|---|---|
{rows}

{wrong}
"""


@dataclass
class Row:
    """What came of one kind of fault in one command."""

    command: str
    fault: str
    possible: int
    tried: int = 0
    struck: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, trial: Trial) -> None:
        self.tried += 1
        self.struck += trial.struck
        self.right += not trial.wrong
        if trial.wrong:
            self.wrong.append(f"{', '.join(map(str, trial.faults))}: {trial.wrong}")
            print(f"{self.command}, {self.wrong[-1]}", flush=True)


def plan(world: World, name: str, kind: str) -> Iterator[Faults]:
    """All faults of one kind for a command."""
    rng = random.Random(f"{name} {kind}")
    _, changes = world.reference(name)
    if kind == "kill":
        yield from ([Fault("kill", at)] for at in range(len(changes)))
    elif kind in ("tear", "full", "short"):
        yield from ([Fault(kind, at)] for at in writes(changes))
    elif kind == "read-only":
        yield [Fault("read-only", 0)]
    elif kind == "repeatedly":
        for _ in range(RANDOM_KILLS):
            yield [Fault("kill", rng.randrange(len(changes))) for _ in range(3)]
    elif kind == "random":
        seconds = world.after(name, []).last.seconds
        yield from ([Signal(rng.uniform(0, seconds))] for _ in range(RANDOM_KILLS))
    elif kind in GROUP:
        seconds = world.after(name, []).last.seconds
        yield from ([Signal(rng.uniform(0, seconds), GROUP[kind], group=True)] for _ in range(GROUP_SIGNALS))
    elif kind == "disk":
        size = sum(path.stat().st_size for path in world.work.rglob("*") if path.is_file())
        yield from ([Room(int(share * size))] for share in ROOMS)


def try_command(name: str, folder: Path, seconds: float) -> list[Row]:
    """All faults of a command in a random order, as many as the time allows; all of several processes."""
    world = World(folder / name.replace(", ", "_").replace(" ", "_"))
    kinds = _kinds(name)
    with small_disk(folder / f"{world.folder.name}_disk") as mounted:
        worlds: dict[str, World] = dict.fromkeys(kinds, world)
        if mounted and "disk" in kinds:
            worlds["disk"] = World(folder / f"{world.folder.name}_disk" / "world")
        else:
            worlds.pop("disk", None)
        trials = [(kind, faults) for kind, own in worlds.items() for faults in plan(own, name, kind)]
        random.Random(name).shuffle(trials)
        counts = Counter(kind for kind, _ in trials)
        rows = {kind: Row(name, TITLES[kind], counts[kind]) for kind in worlds}
        start = time.monotonic()
        for kind, faults in trials:
            if name not in PARALLEL and time.monotonic() - start > seconds:
                break
            rows[kind].add(worlds[kind].after(name, faults))
    for row in rows.values():
        print(f"{name}, {row.fault}: {row.tried} of {row.possible} tried, {row.right} as undisturbed", flush=True)
    return list(rows.values())


def _kinds(name: str) -> list[str]:
    if name in PARALLEL:
        return list(GROUP)
    return [kind for kind in TITLES if kind not in GROUP and (name in MAIN or kind not in ("random", "repeatedly"))]


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of its own at `folder`; False where this user may not have one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def write(rows: Sequence[Row], seconds: float, args: argparse.Namespace) -> None:
    """The tables for people and for programs."""
    folder = args.out
    about = {
        "command": f"python benchmarks/faults.py --minutes {args.minutes:g} --jobs {args.jobs}"
        + "".join(f" --only {shlex.join(args.only)}" for _ in args.only[:1]),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(seconds),
    }
    found = {**about, "rows": [asdict(row) for row in rows]}
    (folder / "faults.json").write_text(json.dumps(found, indent=1) + "\n")
    table = "\n".join(
        f"| {row.command} | {row.fault} | {row.possible} | {row.tried} | {row.struck} | {row.right} |"
        for row in rows
        if row.tried
    )
    wrong = "\n".join(f"- {row.command}, {row.fault}: {text}" for row in rows for text in row.wrong)
    (folder / "faults.md").write_text(PAGE.format(rows=table, wrong=wrong or "Nothing else was found.", **about))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds of `convert`; nothing is written")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for each command; a random choice of faults")
    parser.add_argument(
        "--only", nargs="+", choices=(names := [*MAIN, *PARALLEL, *OTHERS]), default=[], help="these alone"
    )
    parser.add_argument("--jobs", type=int, default=1, help="commands that are tried at the same time")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="folder of the results")
    args = parser.parse_args()
    start, rows = time.monotonic(), []
    with TemporaryDirectory() as folder:
        if args.quick:
            rows = try_command("convert", Path(folder), seconds=5)
        else:
            with ThreadPoolExecutor(args.jobs) as pool:
                for found in pool.map(try_command, args.only or names, repeat(Path(folder)), repeat(60 * args.minutes)):
                    rows += found
                    write(rows, time.monotonic() - start, args)
    if any(row.wrong for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
