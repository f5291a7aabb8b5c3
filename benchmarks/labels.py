"""How fast weak labels are made: images and prompts per second by workers, and how that grows with M segments.

    python benchmarks/labels.py [--quick] [--out FILE.md]

Phantom scans at 512 x 512 pixels, superpixels and the shipped ranker, a fresh store each time. Rankings alone are the
prompts per second of a second run with new questions: nothing is proposed or embedded then.
"""

import argparse
import io
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from a3tune.data.images import load_image
from a3tune.data.phantom.dataset import write_phantom
from a3tune.data.rows import read_rows
from a3tune.labels.propose import Superpixels
from a3tune.labels.rank import make_ranker
from a3tune.labels.store import label_images
from a3tune.types import ImageSource, Sample
from a3tune.vlm.tiny import shipped

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


def measure(samples: list[Sample], segments: int, workers: int) -> str:
    """One row of the table."""
    ranker = make_ranker(shipped("ranker"), "cpu")
    again = [replace(sample, prompt=f"{sample.prompt} Please.") for sample in samples]
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for asked in (samples, again):
            start = time.perf_counter()
            run = label_images(
                asked, Superpixels(max_segments=segments), ranker, Path(folder), visual_prompt="dim", workers=workers
            )
            seconds.append(time.perf_counter() - start)
    first, second = seconds
    return (
        f"| {workers} | {segments} | {run.images} | {run.images / first:.2f} | {len(samples) / first:.1f} "
        f"| {run.ranked / second:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, one size")
    parser.add_argument("--out", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    samples = phantoms(6 if arguments.quick else 20)
    lines = [
        f"{os.cpu_count()} processors, {SIDE} x {SIDE} pixels, superpixels, shipped ranker, one thread per process",
        "",
        "| Workers | M segments | Images | Images/s | Prompts/s | Rankings alone/s |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for workers in (1, 2):
        for segments in (16,) if arguments.quick else (8, 16, 32, 64):
            lines.append(measure(samples, segments, workers))
            print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
