"""How fast weak labels are made: images and prompts per second by workers, and how that grows with M segments.

    python benchmarks/labels.py [--quick] [--out FILE]

Phantom scans at 512 x 512 pixels, superpixels and the shipped ranker, a fresh store each time. Rankings alone are the
prompts per second of a second run with new questions: nothing is proposed or embedded then. Two workers are processes,
and then those of a Ray cluster of this machine, which is there before the time runs.
"""

import argparse
import io
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from measure import about, listed, table, write
from PIL import Image

from a3tune.data.images import load_image
from a3tune.data.phantom.dataset import write_phantom
from a3tune.data.rows import read_rows
from a3tune.labels.make import LabelMaker
from a3tune.labels.propose.superpixels import Superpixels
from a3tune.labels.rank import make_ranker
from a3tune.labels.store import label_images
from a3tune.machine.cluster import connect
from a3tune.models import shipped
from a3tune.types import ImageSource, Sample

SIDE = 512


def phantoms(count: int) -> list[Sample]:
    """The questions of so many phantom scans, at the size of clinical images."""
    with tempfile.TemporaryDirectory() as folder:
        samples = read_rows(write_phantom(Path(folder), {"test": count})["test"])
        chosen = list(dict.fromkeys(sample.image for sample in samples))[:count]
        enlarged = {source: _enlarged(source) for source in chosen}
    return [replace(sample, image=enlarged[sample.image]) for sample in samples if sample.image in enlarged]


def _enlarged(source: ImageSource) -> bytes:
    content = io.BytesIO()
    load_image(source).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(content, "PNG")
    return content.getvalue()


@dataclass(frozen=True)
class Timing:
    """Of one number of segments and workers."""

    backend: str
    workers: int
    segments: int
    images: int
    prompts: int
    seconds: float
    """From images to ranked segments."""
    ranking_seconds: float
    """Of as many new questions about the same images."""

    def cells(self) -> list[str]:
        """The row of the table."""
        rates = [self.images / self.seconds, self.prompts / self.seconds, self.prompts / self.ranking_seconds]
        return [self.backend, *map(str, (self.workers, self.segments, self.images)), *(f"{rate:.3g}" for rate in rates)]


def measure(
    samples: list[Sample], segments: int, workers: int, backend: Literal["process", "ray"] = "process"
) -> Timing:
    """Both runs, in a store of their own."""
    ranker = make_ranker(shipped("ranker"), "cpu")
    again = [replace(sample, prompt=f"{sample.prompt} Please.") for sample in samples]
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for asked in (samples, again):
            start = time.perf_counter()
            run = label_images(
                asked,
                LabelMaker(Superpixels(max_segments=segments), ranker),
                Path(folder),
                workers=workers,
                backend=backend,
            )
            seconds.append(time.perf_counter() - start)
    return Timing(backend, workers, segments, run.images, run.ranked, *seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, one size, one worker")
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    samples = phantoms(2 if arguments.quick else 20)
    found = []
    sides: list[tuple[Literal["process", "ray"], int]] = [("process", 1), ("process", 2), ("ray", 2)]
    if arguments.quick:
        sides = sides[:1]
    else:
        connect(2)
    for backend, workers in sides:
        for segments in (16,) if arguments.quick else (8, 16, 32, 64):
            found.append(measure(samples, segments, workers, backend))
            print(found[-1], flush=True)
    lines = listed(about())
    lines += [f"- {SIDE} x {SIDE} pixels, superpixels, shipped ranker, one thread per process; rates per second", ""]
    header = ["Backend", "Workers", "M segments", "Images", "Images/s", "Prompts/s", "Rankings alone/s"]
    text = "\n".join(["# Labelling", "", *lines, table(header, [own.cells() for own in found])])
    write(arguments.out, {"about": about(), "timings": found}, text)


if __name__ == "__main__":
    main()
