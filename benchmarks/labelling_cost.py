"""Processor time of labelling an image of 64 segments, part by part, beside that of an earlier version.

    python benchmarks/labelling_cost.py [--before TREE] [--images DIR] [--quick] [--repetitions N] [--out FILE]

`TREE` is a working tree of that version (`git worktree add TREE COMMIT`). Both versions run in processes of their own
and take turns image by image, each on all images in each round. Phantom scans as they are and enlarged, and with
`--images` a folder's first few real ones: superpixels and the shipped ranker (`dim`), one thread, no disk. The labels
of both are compared bit by bit.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from measure import Spread, about, listed, table, write
from PIL import Image

from a3tune.data.images import load_image
from a3tune.data.phantom.dataset import write_phantom
from a3tune.data.rows import read_rows
from a3tune.labels.make import LabelMaker
from a3tune.labels.propose.superpixels import Superpixels
from a3tune.labels.rank import make_ranker
from a3tune.machine.hashes import short_hash
from a3tune.models import shipped

IMAGES = 6
SIDE = 512


class Side:
    """One version in a process of its own, asked for one image after the other."""

    def __init__(self, tree: Path):
        environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--serve"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def label(self, image: Path) -> tuple[float, float, str]:
        """Seconds of processor time to propose and to embed, and a hash of the labels."""
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None and answers is not None
        print(image, file=asked, flush=True)
        propose, embed, labels = answers.readline().split()
        return float(propose), float(embed), labels

    def close(self) -> None:
        """Ends the process: it has nothing more to read."""
        self._process.communicate()


def serve(asked: IO[str], answers: IO[str]) -> None:
    """The other end of a `Side`."""
    torch.set_num_threads(1)
    maker = LabelMaker(Superpixels(), make_ranker(shipped("ranker"), "cpu"))
    for line in asked:
        image = load_image(Path(line.strip()))
        start = time.process_time()
        segments = maker.proposer(image)
        proposed = time.process_time()
        vectors = maker.embed_segments(image, segments)
        embedded = time.process_time()
        labels = short_hash([[segment.mask.counts, segment.score] for segment in segments] + [vectors.tobytes().hex()])
        print(proposed - start, embedded - proposed, labels, file=answers, flush=True)


def images(folder: Path, real: Path | None, count: int) -> dict[str, list[Path]]:
    """Kind of image -> files."""
    rows = read_rows(write_phantom(folder / "phantom", {"test": count})["test"])
    scans = [source for source in dict.fromkeys(row.image for row in rows) if isinstance(source, Path)][:count]
    enlarged: list[Path] = []
    for number, scan in enumerate(scans):
        enlarged.append(folder / f"{number}.png")
        load_image(scan).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(enlarged[-1])
    kinds = {"phantom": scans, f"phantom at {SIDE} x {SIDE}": enlarged}
    if real is not None:
        files = sorted(real.iterdir())[:count]
        kinds[f"real ({_sizes(files)})"] = files
    return kinds


def _sizes(files: list[Path]) -> str:
    width, height = np.median([load_image(file).size for file in files], axis=0).astype(int)
    return f"median {width} x {height}"


def measure(sides: dict[str, Side], files: list[Path], repetitions: int) -> dict[str, dict[str, Any]]:
    """For each side the seconds per image of each round, and the labels; a round more at the start is not counted."""
    found: dict[str, dict[str, Any]] = {name: {"propose": [], "embed": [], "labels": []} for name in sides}
    for round_ in range(-1, repetitions):
        sums = {name: np.zeros(2) for name in sides}
        for number, file in enumerate(files):
            for name in list(sides)[:: 1 if (round_ + number) % 2 else -1]:
                propose, embed, labels = sides[name].label(file)
                sums[name] += (propose, embed)
                if round_ < 0:
                    found[name]["labels"].append(labels)
        for name, (propose, embed) in sums.items():
            if round_ >= 0:
                found[name]["propose"].append(propose / len(files))
                found[name]["embed"].append(embed / len(files))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="working tree of the version to compare with")
    parser.add_argument("--images", type=Path, help="folder of real images")
    parser.add_argument("--quick", action="store_true", help="two images, one round")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve:
        serve(sys.stdin, sys.stdout)
        return
    count, repetitions = (2, 1) if options.quick else (IMAGES, options.repetitions)
    trees = {"before": options.before} if options.before else {}
    trees["now"] = Path(__file__).parents[1]
    sides = {name: Side(tree.resolve()) for name, tree in trees.items()}
    record, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for kind, files in images(Path(folder), options.images, count).items():
            found = record[kind] = measure(sides, files, repetitions)
            for name, side in found.items():
                whole = [sum(parts) for parts in zip(side["propose"], side["embed"], strict=True)]
                same = "yes" if side["labels"] == found["now"]["labels"] else "no"
                rows.append([kind, name, *(Spread.of(part) for part in (side["propose"], side["embed"], whole)), same])
    for side in sides.values():
        side.close()
    lines = listed(about())
    lines += [f"- {count} images of each kind, {repetitions} rounds; median (least to most)", ""]
    header = ["Images", "Version", "Segments, s", "Their vectors, s", "Both, s an image", "The same labels"]
    text = "\n".join(["# Cost of labelling", "", *lines, table(header, rows)])
    write(options.out, {"about": about(), "seconds": record}, text)


if __name__ == "__main__":
    main()
