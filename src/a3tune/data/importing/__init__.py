"""Tables as people have them -> rows, split by patient or image, with what was left out. Knows no model.

CSV, TSV, Excel, JSON, JSON lines, parquet, saved Hugging Face data sets, conversations of LLaVA and chat trainers, and
folders of images with `metadata`.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from a3tune.data.importing.cleaning import Found, file_of, without_duplicates, without_personal_fields
from a3tune.data.importing.columns import Columns, choose_columns
from a3tune.data.importing.fetching import Source, find_source
from a3tune.data.importing.pictures import Pictures, look_at
from a3tune.data.importing.rows import samples_of
from a3tune.data.importing.sources import SPLITS, Part, find_parts, read_part
from a3tune.data.importing.splitting import Splits, leaks, split
from a3tune.data.rows import write_rows
from a3tune.errors import DataError, shown
from a3tune.machine.files import all_or_none, write_atomic
from a3tune.types import Sample

Progress = Callable[[int, int], None]
ALL = "rows"
"""The one file, where nothing is split."""
RECORD = "import.json"
"""File that says what the rows beside it were made of."""
_LOOKED_AT = 100
"""Rows whose columns are gathered before they are guessed."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import read, wrote and left out."""

    files: Mapping[str, Path]
    """Split -> its file of rows."""
    splits: Mapping[str, Sequence[Sample]]
    columns: Mapping[str, str]
    """Column -> what became of it."""
    read: int
    """Rows of the tables."""
    left_out: tuple[str, ...]
    """A line for each row that was left out."""
    notes: tuple[str, ...]
    """What else to know: duplicates, leaks, how it was split."""


def import_rows(
    source: Path,
    out: Path,
    *,
    columns: Mapping[str, str] | None = None,
    images: Path | None = None,
    prompt: str | None = None,
    shares: Sequence[float] = (0.8, 0.1, 0.1),
    by: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Imported:
    """Make rows of a table, a folder of tables, or a data set of the Hugging Face Hub, and write them to `out`: one
    file for each split, and `import.json`, which says what they were made of.

    Images are named relative to `out`; those that the table holds are written to `out/images`. A row that cannot be
    used is left out, and told. Splits are those of the source (a column, or the names of its files), else groups of
    `shares`, which are 1 in all.

    Args:
        source: a path, or `owner/name` or `owner/name@revision` of the Hub (`fetching.find_source`).
        columns: field (`columns.KNOWN`) -> column, where names do not tell.
        images: folder that names of images are relative to, besides the table's own.
        prompt: the question of every row, where the table has none.
        by: column or field that no two splits share a value of; "patient" where it is known, else "image".
        progress: counts images that are opened.

    Raises:
        DataError: the source is no table, columns are missing, or no row can be used.
        OutputError: the disk refuses.
    """
    with all_or_none() as new:
        pictures = Pictures((images,) if images else (), out / "images", new)
        place = find_source(source)
        done = _import(place, out, columns or {}, pictures, prompt, shares, by, progress)
        write_atomic(new(out / RECORD), _record(source, place, done))
        return done


def _import(
    source: Source,
    out: Path,
    said: Mapping[str, str],
    pictures: Pictures,
    prompt: str | None,
    shares: Sequence[float],
    by: str | None,
    progress: Progress,
) -> Imported:
    left_out: list[str] = []
    found: Found = {}
    read, became = 0, dict[str, str]()
    parts = find_parts(source.path)
    for part in parts:
        rows = read_part(part)
        head = list(islice(rows, _LOOKED_AT))
        names = list(dict.fromkeys(name for _, row in head for name in row if name))
        if not head:
            left_out.append(f"{part.path.name}: a table without rows")
            continue
        if not names:
            raise DataError(f"{part.path}:{head[0][0]}: {head[0][1].get('', 'no column has a name')}")
        chosen = choose_columns(str(part.path), names, said)
        became |= _became(chosen)
        for number, row in chain(head, rows):
            read += 1
            name = str(row.get(chosen.of.get("id", ""), "")).strip() or f"{part.path.stem}-{number}"
            try:
                samples, problems = samples_of(row, chosen, name, part.folder, pictures, prompt)
                place = _split_of(part, row, chosen)
            except DataError as error:
                left_out.append(f"{part.path.name}:{number}: {error}")
            else:
                found.setdefault(place, []).extend(samples)
                left_out += [f"{part.path.name}:{number}: {problem}" for problem in problems]
    notes = list(source.notes)
    hashes = _open_images(found, left_out, pictures.out, progress)
    without_duplicates(found, hashes, notes)
    if not any(found.values()):
        listed = "".join(f"\n  {line}" for line in left_out[:10])
        raise DataError(f"{source.path}: expected rows, none of {read:,} can be used:{listed}")
    splits = _splits(found, hashes, shares, by, notes)
    without_personal_fields(splits, became)
    if empty := [name for name, samples in splits.items() if not samples]:
        notes.append(f"too few images or patients for {' and '.join(empty)}")
    splits = {name: samples for name, samples in splits.items() if samples}
    files = {name: out / f"{name}.jsonl" for name in splits}
    for name, samples in splits.items():
        write_rows(pictures.new(files[name]), _unique_ids(samples, notes))
    return Imported(files, splits, became, read, tuple(left_out), tuple(notes))


def _record(source: Path, place: Source, done: Imported) -> bytes:
    about = {
        "source": str(source),
        "commit": place.commit or None,
        "columns": done.columns,
        "read": done.read,
        "left_out": len(done.left_out),
        "written": {name: len(samples) for name, samples in done.splits.items()},
        "notes": done.notes,
    }
    return (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode()


def _split_of(part: Part, row: Mapping[str, object], columns: Columns) -> str | None:
    value = row.get(columns.of["split"]) if "split" in columns.of else None
    if value in (None, ""):
        return part.split
    name = SPLITS.get(str(value).strip().lower())
    if name is None:
        raise DataError(f"split: expected one of {', '.join(SPLITS)}, got {shown(value)}")
    return name


def _became(columns: Columns) -> dict[str, str]:
    return (
        {column: name for name, column in columns.of.items()}
        | dict.fromkeys(columns.options, "options")
        | {column: f"meta.{column}" for column in columns.rest}
    )


def _open_images(found: Found, left_out: list[str], held: Path, progress: Progress) -> dict[Path, str]:
    """Hash of the file of every image; samples whose image does not open are taken out, with its file in `held`."""
    images = dict.fromkeys(sample.image for samples in found.values() for sample in samples)
    hashes, errors = look_at([image for image in images if isinstance(image, Path)], progress)
    for image in errors:
        if image.parent == held:
            image.unlink(missing_ok=True)
    for place, samples in found.items():
        left_out += [f"{sample.id}: {errors[sample.image]}" for sample in samples if sample.image in errors]
        found[place] = [sample for sample in samples if sample.image in hashes]
    return hashes


def _splits(
    found: Mapping[str | None, list[Sample]],
    hashes: Mapping[Path, str],
    shares: Sequence[float],
    by: str | None,
    notes: list[str],
) -> Splits:
    def image(sample: Sample) -> str:
        return file_of(sample, hashes)

    keys: dict[str, Callable[[Sample], str | None]] = {"image": image, "patient": lambda row: row.meta.get("patient")}
    given: Splits = {name: found[name] for name in ("train", "validation", "test") if found.get(name)}
    rest = found.get(None, [])
    if given and not rest:
        notes.append("split as the source says")
        return _checked(given, keys, notes)
    if given:
        raise DataError(f"{len(rest):,} rows say no split, others do: give all of them one, or none")
    if sum(share > 0 for share in shares) < 2:
        return {ALL if not any(shares[1:]) else "test": rest}
    by = by or ("patient" if all("patient" in sample.meta for sample in rest) else "image")
    counts = Counter(key for sample in rest for key in sample.meta)
    if by != "image" and counts[by] < len(rest):
        full = ", ".join(["image", *(key for key, count in sorted(counts.items()) if count == len(rest))])
        raise DataError(
            f"--by {by}: expected image, or a column that every row has ({full}); {len(rest) - counts[by]:,} of "
            f"{len(rest):,} rows have no {by}"
        )
    if by == "image":
        some = f"{len(rest) - counts['patient']:,} rows say no patient" if counts["patient"] else ""
        mend = some or "--map patient=COLUMN mends it"
        notes.append(f"split by image: two images of one patient may be in two splits; {mend}")
    else:
        notes.append(f"split by {by}")
    return _checked(split(rest, shares, image if by == "image" else lambda row: row.meta[by]), keys, notes)


def _checked(splits: Splits, keys: Mapping[str, Callable[[Sample], str | None]], notes: list[str]) -> Splits:
    notes += leaks(splits, keys)
    return splits


def _unique_ids(samples: Sequence[Sample], notes: list[str]) -> list[Sample]:
    counts = Counter(sample.id for sample in samples)
    if len(counts) == len(samples):
        return list(samples)
    notes.append(f"{len(samples) - len(counts):,} ids were there already: all rows of the file are numbered instead")
    return [replace(sample, id=str(number)) for number, sample in enumerate(samples, start=1)]


def format_import(done: Imported) -> str:
    """An import as text: columns, counts by split and kind of answer, notes."""
    lines = [f"{'column':<24}becomes"]
    lines += [f"{column:<24.24}{field}" for column, field in done.columns.items()]
    kinds = sorted({sample.answer_type for samples in done.splits.values() for sample in samples})
    lines += ["", f"{'split':<12}{'rows':>9}{'images':>9}{'patients':>10}" + "".join(f"{kind:>9}" for kind in kinds)]
    for name, samples in done.splits.items():
        images = len({sample.image for sample in samples})
        patients = {sample.meta["patient"] for sample in samples if "patient" in sample.meta}
        counts = Counter(sample.answer_type for sample in samples)
        row = f"{name:<12}{len(samples):>9,}{images:>9,}{len(patients) or '-':>10}"
        lines.append(row + "".join(f"{counts[kind]:>9,}" for kind in kinds))
    made = sum(map(len, done.splits.values()))
    lines += ["", f"{done.read:,} rows read, {len(done.left_out):,} left out, {made:,} written", *done.notes]
    return "\n".join(lines)
