"""The fuzz tests with far more examples, round after round with new seeds, in child processes of limited memory.

    python benchmarks/fuzz.py --minutes 10

A crash of an interpreter, a reader that hangs or takes more than `MEMORY` bytes fails its round like any failed test.
Each round prints its seed, with which it can be run again. Ends with exit code 1 if a round failed.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

MEMORY = 6 * 2**30
"""Address space of a round: the libraries alone take about 3 GB of it, few of them in memory."""
_LINES = 80
"""That are shown of a failed round: its error and the example that makes it."""
_TESTS = Path(__file__).parents[1] / "tests"


def run(path: Path, seed: int, examples: int, seconds: float) -> str:
    """What a round of one file of tests printed if it failed, else nothing."""
    command = [sys.executable, "-m", "pytest", str(path), f"--hypothesis-seed={seed}", "--tb=short"]
    try:
        done = subprocess.run(
            command,
            cwd=_TESTS.parent,
            env=os.environ | {"A3TUNE_FUZZ_EXAMPLES": str(examples)},
            capture_output=True,
            text=True,
            timeout=seconds,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
        )
    except subprocess.TimeoutExpired as late:
        return f"not done after {seconds:.0f} s\n{late.stdout or ''}"
    return done.stdout + done.stderr if done.returncode else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--examples", type=int, default=2000, help="of each test in a round")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--only", default="test_fuzz_*.py", help="pattern of the files of tests")
    parser.add_argument("--quick", action="store_true", help="one small round, to see that it works")
    args = parser.parse_args()
    files = sorted(_TESTS.glob(args.only))
    examples = 20 if args.quick else args.examples
    started, seed, failed = time.monotonic(), args.seed, 0
    while seed == args.seed or (time.monotonic() - started < 60 * args.minutes and not args.quick):
        for path in files:
            begun = time.monotonic()
            found = run(path, seed, examples, 3600)
            failed += bool(found)
            state = "FAILED" if found else "ok"
            print(f"{path.name} seed {seed} x {examples}: {state}, {time.monotonic() - begun:.0f} s", flush=True)
            print("".join(f"{line[:200]}\n" for line in found.splitlines()[-_LINES:]), end="", flush=True)
        seed += 1
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
