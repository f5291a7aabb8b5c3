"""What `a3tune data import` makes of each kind of source, how long it takes, and how much memory.

    python benchmarks/importing.py [--rows N] [--out FILE]

Each import is the command, in a Python process of its own. The rows are drawn: 20 questions about each image, of
patients of two images; one row in 100 has no answer, one in 100 is a copy of the row before, one in 100 names no image
that is there. Peak memory is that of the process, Python and its libraries included.
"""

import argparse
import csv
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from measure import about, listed, table, write
from PIL import Image

ASKED = 20
"""Questions about an image."""
MAIN = """
import json, sys, time
from resource import RUSAGE_SELF, getrusage
from a3tune.cli import main
start = time.perf_counter()
try:
    main()
finally:
    used = getrusage(RUSAGE_SELF)
    wall, cpu = time.perf_counter() - start, used.ru_utime + used.ru_stime
    status = open("/proc/self/status").read()  # ru_maxrss is that of the parent where this is larger
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    print("\\n" + json.dumps({"wall": wall, "cpu": cpu, "peak": peak}))
"""
Row = dict[str, Any]


def picture(number: int) -> bytes:
    """A small image, another for each number."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (number % 256, number // 256 % 256, number // 65536)).save(buffer, "PNG")
    return buffer.getvalue()


def draw(rows: int) -> Iterator[Row]:
    """Rows of the public names, `image` the number of an image."""
    before: Row = {}
    for number in range(rows):
        image = number // ASKED
        row = {
            "image": f"scans/{image}.png",
            "patient": f"p{image // 2}",
            "modality": ("CT", "MR", "X-ray")[image % 3],
            "question": f"What is shown at place {number % ASKED}?",
            "answer": ("yes", "no", "left lung", "an enlarged heart")[number % 4],
        }
        if number % 100 == 17:
            row["answer"] = ""
        elif number % 100 == 38:
            row = before
        elif number % 100 == 59:
            row["image"] = "scans/none.png"
        yield row
        before = row


def as_csv(folder: Path, rows: int) -> Path:
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(next(draw(1))))
        writer.writeheader()
        writer.writerows(draw(rows))
    return folder / "rows.csv"


def as_excel(folder: Path, rows: int) -> Path:
    import openpyxl

    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(list(next(draw(1))))
    for row in draw(rows):
        sheet.append(list(row.values()))
    book.save(folder / "rows.xlsx")
    return folder / "rows.xlsx"


def as_lines(folder: Path, rows: int) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in draw(rows)))
    return folder / "rows.jsonl"


def as_conversations(folder: Path, rows: int) -> Path:
    """An array of LLaVA's records, each with the questions about one image."""
    drawn, records = draw(rows), []
    for number in count():
        asked = list(islice(drawn, ASKED))
        if not asked:
            break
        talk = [
            {"from": who, "value": text}
            for row in asked
            for who, text in (("human", f"<image>\n{row['question']}"), ("gpt", row["answer"]))
        ]
        records.append({"id": str(number), "image": asked[0]["image"], "conversations": talk})
    (folder / "llava.json").write_text(json.dumps(records))
    return folder / "llava.json"


def as_parquet(folder: Path, rows: int) -> Path:
    pq.write_table(pa.Table.from_pylist(list(draw(rows))), folder / "rows.parquet")
    return folder / "rows.parquet"


def as_parquet_with_images(folder: Path, rows: int) -> Path:
    """As the Hub has it: each row holds the bytes of its image."""
    writer = None
    drawn = draw(rows)
    while batch := list(islice(drawn, 1000)):
        made = pa.Table.from_pylist([row | {"image": held(folder / row["image"])} for row in batch])
        writer = writer or pq.ParquetWriter(folder / "bytes.parquet", made.schema)
        writer.write_table(made)
    assert writer is not None
    writer.close()
    return folder / "bytes.parquet"


def held(path: Path) -> Row:
    return {"bytes": path.read_bytes() if path.exists() else None, "path": None}


SOURCES: dict[str, Callable[[Path, int], Path]] = {
    "CSV": as_csv,
    "Excel": as_excel,
    "JSON lines": as_lines,
    "JSON, LLaVA conversations": as_conversations,
    "parquet, names of images": as_parquet,
    "parquet, images inside": as_parquet_with_images,
}


@dataclass(frozen=True)
class Done:
    """What one import took and made."""

    read: int
    """Rows of the source; of conversations, records."""
    written: int
    left_out: int
    copies: int
    wall: float
    cpu: float
    peak: int
    """Bytes."""


def measure(source: Path, out: Path) -> Done:
    command = [sys.executable, "-c", MAIN, "data", "import", str(source), "--out", str(out)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spent = json.loads(said.splitlines()[-1])
    record = json.loads((out / "import.json").read_text())
    copies = [note for note in record["notes"] if "same of the same image" in note]
    return Done(
        record["read"],
        sum(record["written"].values()),
        record["left_out"],
        int(copies[0].split()[0].replace(",", "")) if copies else 0,
        spent["wall"],
        spent["cpu"],
        spent["peak"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="few rows, to see that it works")
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    args = parser.parse_args()
    rows = 200 if args.quick else args.rows
    found: dict[str, Done] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "scans").mkdir()
        for number in range(-(-rows // ASKED)):
            (folder / "scans" / f"{number}.png").write_bytes(picture(number))
        for name, make in SOURCES.items():
            found[name] = measure(make(folder, rows), folder / f"out-{len(found)}")
    head = [
        "Source",
        "Rows in",
        "Rows out",
        "Left out, and listed",
        "Copies",
        "Seconds",
        "Of the processor",
        "Peak, MB",
    ]
    lines = [
        [
            name,
            f"{done.read:,}",
            f"{done.written:,}",
            f"{done.left_out:,}",
            f"{done.copies:,}",
            f"{done.wall:.1f}",
            f"{done.cpu:.1f}",
            f"{done.peak / 1e6:,.0f}",
        ]
        for name, done in found.items()
    ]
    images = -(-rows // ASKED)
    text = [
        "# Import",
        "\n".join(listed(about())),
        f"{rows:,} questions about {images:,} images of 64 x 64 pixels, every one of which is opened. A conversation "
        "is one row in.",
        table(head, lines),
    ]
    write(args.out, {"about": about(), "sources": found}, "\n\n".join(text))


if __name__ == "__main__":
    main()
