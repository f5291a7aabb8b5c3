"""Flips single bits in every kind of file that a3tune writes, and sees whether it is noticed.

    python benchmarks/damage.py [--quick] [--flips 60]

The files are those of small runs (`tests/flips.py`), read by the functions that commands call. Writes
docs/results/damage.json and damage.md. 60 flips in each kind of file take some two minutes of one processor. Fails if a
flip ends with a traceback, or gives something else without a word where the file is not text for people.
"""

import argparse
import json
import platform
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow
import safetensors
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from flips import Kept, make_files, outcomes  # noqa: E402

PAGE = """# Results of `benchmarks/damage.py`

Each row: files of one kind, in which single random bits were flipped, one at a time. *Told*: refused in one line that
names the file. *Same*: read, with the same result. *Other*: read, with another result and without a word. *Traceback*:
an error that is not ours. Files marked * are text that people read and edit: a digit in them holds as it stands there.

- command: `{command}`
- machine: {machine}, Python {python}, torch {torch}, transformers {transformers}, safetensors {safetensors},
  pyarrow {pyarrow}
- {seconds:.0f} s

| File | Flips | Told | Same | Other | Traceback |
|---|---|---|---|---|---|
{rows}

{wrong}
"""


def try_kind(kept: Kept, count: int) -> dict:
    """What came of all flips in files of one kind."""
    found = list(outcomes(kept, count))
    counts = Counter(outcome for outcome, _ in found)
    bad = ("traceback",) if kept.text_of_users else ("traceback", "other")
    return {
        "file": kept.title + (" *" if kept.text_of_users else ""),
        "flips": count,
        **{outcome: counts[outcome] for outcome in ("told", "same", "other", "traceback")},
        "wrong": [f"{outcome}: {said[-400:]}" for outcome, said in found if outcome in bad],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 flips in each kind of file")
    parser.add_argument("--flips", type=int, default=60, help="in each kind of file")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="folder of the results")
    args = parser.parse_args()
    start, rows = time.monotonic(), []
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    count = 2 if args.quick else args.flips
    with TemporaryDirectory() as folder:
        for kept in make_files(Path(folder)):
            rows.append(row := try_kind(kept, count))
            print({name: value for name, value in row.items() if name != "wrong"}, flush=True)
    about = {
        "command": f"python benchmarks/damage.py --flips {count}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, transformers, safetensors, pyarrow)},
        "seconds": round(time.monotonic() - start),
    }
    wrong = [f"- {row['file']}: {text}" for row in rows for text in row["wrong"]]
    table = [f"| {' | '.join(str(value) for name, value in row.items() if name != 'wrong')} |" for row in rows]
    (args.out / "damage.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    page = PAGE.format(rows="\n".join(table), wrong="\n".join(wrong) or "Nothing else was found.", **about)
    (args.out / "damage.md").write_text(page)
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
