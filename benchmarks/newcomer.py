"""How long the way of a newcomer takes: the blocks of docs/howto/own-data.md as they stand, in an empty folder.

    python benchmarks/newcomer.py [--out FILE]

Every command in a Python process of its own, the programs of the page one after the other in another.
`tests/test_documents.py` runs the same blocks with fewer steps.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from types import ModuleType

from measure import about, listed, table, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from documents import read_blocks

ROOT = Path(__file__).parents[1]
PAGE = "docs/howto/own-data.md"
MAIN = "from a3tune.cli import main; main()"


def walk(most: int | None) -> list[tuple[str, float, float]]:
    """Steps, their seconds, and those of a processor, in the current folder."""
    module = ModuleType("shown")
    sys.modules[module.__name__] = module
    steps: list[tuple[str, float, float]] = []
    for block in read_blocks(ROOT / PAGE, PAGE):
        if block.language == "python" and block.runs:
            start = _clocks()
            exec(compile(block.text, block.page, "exec"), module.__dict__)
            steps.append((f"the program of line {block.line}", *_since(start)))
        elif block.language == "bash" and block.runs:
            for _, words in block.commands():
                start = _clocks()
                subprocess.run([sys.executable, "-c", MAIN, *words[1:]], check=True, capture_output=True)
                steps.append((f"`{' '.join(words)}`", *_since(start)))
        if most is not None and len(steps) >= most:
            break
    return steps


def _clocks() -> tuple[float, float]:
    used = [getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)


def _since(start: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = _clocks()
    return wall - start[0], cpu - start[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first steps, to see that it works")
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    args = parser.parse_args()
    out = args.out.absolute() if args.out else None
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            steps = walk(2 if args.quick else None)
        finally:
            os.chdir(before)
    total = ("all", sum(wall for _, wall, _ in steps), sum(cpu for _, _, cpu in steps))
    rows = [[name, f"{wall:.1f}", f"{cpu:.1f}"] for name, wall, cpu in [*steps, total]]
    text = [
        "# From a spreadsheet and DICOM files to a trained adapter",
        "\n".join(listed(about())),
        "[The page](../howto/own-data.md), block by block: ten drawn patients, the tiny model.",
        table(["Step", "Seconds", "Of a processor"], rows),
    ]
    write(out, {"about": about(), "steps": [*steps, total]}, "\n\n".join(text))


if __name__ == "__main__":
    main()
