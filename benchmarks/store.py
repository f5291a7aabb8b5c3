"""What a label store costs the one process that writes and reads it, and what that means for ten million images.

    python benchmarks/store.py [--quick] [--images N] [--out FILE.md]

The segments are real (phantom scans at 512 x 512 pixels, superpixels), vectors of BiomedCLIP's width and similarities
are drawn; they are written again and again under other names. Processor time, because wall time is noisy on shared
machines; the last column multiplies, nothing more.
"""

import argparse
import hashlib
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from labels import SIDE, phantoms

from a3tune.data.images import content_hash
from a3tune.labels.make import LabelMaker
from a3tune.labels.propose.superpixels import Superpixels
from a3tune.labels.rank import make_ranker
from a3tune.labels.rows import TABLES, open_table
from a3tune.labels.store import SHARD_IMAGES, label_images
from a3tune.labels.stored import StoredSettings, stored_settings
from a3tune.labels.table import Table
from a3tune.models import shipped
from a3tune.types import Sample

QUESTIONS = 5
SEGMENTS = 64
WIDTH = 512
WANTED = 10_000_000
NAMES = StoredSettings("s", "r", "{question}", {}, {})
READS = 1000


def real_rows(images: int) -> tuple[list[dict], bytes]:
    """Rows of segments of a real store, and one of its images."""
    samples = phantoms(images)
    ranker = make_ranker(shipped("ranker"), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        label_images(samples, LabelMaker(Superpixels(max_segments=SEGMENTS), ranker), Path(folder))
        segments = open_table(Path(folder), "segments", *stored_settings(Path(folder)))
        hashes = dict.fromkeys(content_hash(sample.image) for sample in samples)
        return [row for row in map(segments.get, hashes) if row], samples[0].image


def name_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def question_of(number: int, question: int) -> str:
    return f"Question {question} about scan {number}: is there a lesion in the left kidney?"


def write(folder: Path, rows: list[dict], images: int) -> None:
    tables = {name: open_table(folder, name, NAMES) for name in TABLES}
    drawn = random.Random(0)
    # As many as a shard holds: what is alike in a shard takes no room.
    vectors = [drawn.randbytes(2 * WIDTH * SEGMENTS) for _ in range(SHARD_IMAGES)]
    similarities = [[drawn.random() for _ in range(SEGMENTS)] for _ in range(SHARD_IMAGES * QUESTIONS)]
    for number in range(images):
        image = name_of(number)
        tables["segments"].add({**rows[number % len(rows)], "image": image})
        tables["embeddings"].add({"image": image, "width": WIDTH, "vectors": vectors[number % SHARD_IMAGES]})
        for question in range(QUESTIONS):
            values = similarities[(number * QUESTIONS + question) % len(similarities)]
            row = {"image": image, "query": question_of(number, question), "similarity": values}
            tables["similarities"].add(row)
        if number % SHARD_IMAGES == SHARD_IMAGES - 1 or number == images - 1:
            for table in tables.values():
                table.write()


def read(tables: dict[str, Table], images: int, numbers: Iterable[int]) -> None:
    for number in numbers:
        assert tables["segments"].get(name_of(number % images))
        assert tables["similarities"].get(name_of(number % images), question_of(number % images, 0))


def held(make: Callable[[], object]) -> int:
    """Bytes of Python's memory that what `make` returns holds."""
    tracemalloc.start()
    made = make()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del made
    return size


def samples_of(images: int) -> list[Sample]:
    return [
        Sample(f"{number}-{question}", Path(f"images/part/{number}.png"), question_of(number, question), "yes", "open")
        for number in range(images)
        for question in range(QUESTIONS)
    ]


def measure(images: int) -> list[tuple[str, float, str]]:
    """What, how much per image, and its unit."""
    rows, picture = real_rows(min(images // 50, SHARD_IMAGES))
    found = [("segments of an image", sum(len(row["counts"]) for row in rows) / len(rows), "")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.process_time()
        write(folder, rows, images)
        found.append(("write, processor time", (time.process_time() - start) / images, "s"))
        shards = {table: list((folder / table).rglob("*.parquet")) for table in TABLES}
        for table, paths in shards.items():
            found.append((f"{table} on disk", sum(path.stat().st_size for path in paths) / images, "B"))
        found.append(("files", sum(map(len, shards.values())) / images, ""))

        start = time.process_time()
        tables = {table: open_table(folder, table, NAMES) for table in TABLES}
        found.append(("open, processor time", (time.process_time() - start) / images, "s"))
        index = held(lambda: [open_table(folder, table, NAMES) for table in TABLES])
        found.append(("index in memory", index / images, "B"))
        for order, numbers in (
            ("in order", list(range(READS))),
            ("at random", random.Random(0).choices(range(images), k=READS)),
        ):
            start = time.process_time()
            read(tables, images, numbers)
            found.append((f"read labels {order}, processor time", (time.process_time() - start) / READS, "s"))

        found.append((f"{QUESTIONS} samples in memory", held(lambda: samples_of(images)) / images, "B"))
        scan = folder / "scan.png"
        scan.write_bytes(picture)
        start = time.process_time()
        for _ in range(READS):
            content_hash(scan)
        seconds = (time.process_time() - start) / READS
        found.append((f"name an image ({len(picture):,} B), processor time", seconds, "s"))
    return found


def line(what: str, each: float, unit: str) -> str:
    total = each * WANTED
    if unit == "s":
        return f"| {what} | {1e3 * each:.3g} ms | {total / 3600:,.1f} h |"
    if unit == "B":
        return f"| {what} | {each:,.0f} B | {total / 1e9:,.0f} GB |"
    return f"| {what} | {each:.3g} | {total:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 images")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--out", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = 100 if arguments.quick else arguments.images
    lines = [
        f"{images:,} images, {SIDE} x {SIDE} pixels, {QUESTIONS} questions each, shards of {SHARD_IMAGES} images",
        "",
        f"| | An image | {WANTED:,} images |",
        "|---|---|---|",
        *(line(*row) for row in measure(images)),
    ]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
