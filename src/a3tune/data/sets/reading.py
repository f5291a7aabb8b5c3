"""One pass over the folder of a data set: rows read, and everything that is wrong, file by file. Opens no image."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a3tune.data.paths import PACKED, inside
from a3tune.data.plain_json import parse_json
from a3tune.errors import DataError, shown
from a3tune.types import Sample

Progress = Callable[[int, int], None]
Splits = dict[str, list[Sample]]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with one file of a data set."""

    file: str
    """Relative to the data set's folder."""
    what: str
    blocking: bool = True
    """False: the data set can be used without it."""


@dataclass(slots=True)
class Reading:
    """What a reader is handed: the folder, and where to put problems instead of stopping at the first."""

    folder: Path
    progress: Progress | None = None
    problems: list[Problem] = field(default_factory=list)
    rows: Counter[str] = field(default_factory=Counter)
    """Rows of the published files by split, left-out ones included."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that have no sample, by the reason."""
    _missing: dict[str, Counter[str]] = field(default_factory=dict)
    _present: dict[Path, bool] = field(default_factory=dict)

    def problem(self, file: Path | str, what: str, *, blocking: bool = True) -> None:
        """Note something wrong with a file (a path inside the folder, or relative to it)."""
        name = file if isinstance(file, str) else file.relative_to(self.folder).as_posix()
        self.problems.append(Problem(name, what, blocking))

    def load(self, name: str) -> list[dict[str, Any]]:
        """Objects of a JSON list or of JSON lines; what is missing or damaged is noted, and left out."""
        return self._objects(name, self._json(name, []))

    def load_object(self, name: str, parts: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
        """Lists of objects by name out of a JSON object; what is missing or damaged is noted, and left out."""
        data = self._json(name, None)
        if data is not None and not isinstance(data, dict):
            self.problem(name, f"expected an object with {', '.join(parts)}, got {type(data).__name__}")
        return {part: self._objects(name, data.get(part)) for part in parts} if isinstance(data, dict) else {}

    def _json(self, name: str, default: Any) -> Any:
        path = self.folder / name
        try:
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix == ".jsonl":
                return [parse_json(line, constants=True) for line in text.split("\n") if line.strip()]
            return parse_json(text, constants=True)
        except FileNotFoundError:
            self.problem(name, "missing")
        except (OSError, ValueError) as error:
            self.problem(name, f"expected JSON text, cannot read it: {error}")
        return default

    def _objects(self, name: str, rows: Any) -> list[dict[str, Any]]:
        if not isinstance(rows, list):
            self.problem(name, f"expected a list of objects, got {type(rows).__name__}")
            return []
        odd = sum(not isinstance(row, dict) for row in rows)
        if odd:
            self.problem(name, f"{odd} of {len(rows)} entries are no objects")
        return [row for row in rows if isinstance(row, dict)]

    def image(self, where: str, folder: Path, name: object) -> Path | None:
        """The path of the image that a row of the file `where` names; noted if it is missing, None if it is no name."""
        try:
            path = inside(folder, name)
        except DataError as error:
            self.problem(where, f"names an image wrongly: {error}")
            return None
        if path not in self._present:
            self._present[path] = path.is_file()
        if not self._present[path]:
            name = path.relative_to(self.folder).as_posix()
            self._missing.setdefault(name, Counter())[where] += 1
        return path

    def image_there(self, where: str, folder: Path, name: object) -> tuple[Path | None, str]:
        """As `image`, of a data set of which a part on the disk is enough: None, and why, if it is not there."""
        try:
            path = inside(folder, name)
        except DataError as error:
            self.problem(where, f"names an image wrongly: {error}")
            return None, "no image named"
        return (path, "") if path.is_file() else (None, "image not on the disk")

    def split_again(self, train: list[Sample], test: list[Sample]) -> Splits:
        """A split of our own in place of the published one; rows without a sample are in neither."""
        self.rows = Counter({"train": len(train), "test": len(test)})
        if self.left_out:
            self.rows["left out"] = sum(self.left_out.values())
        return {"train": train, "test": test}

    def require(self, file: Path, what: str) -> bool:
        """Whether a file is there that the data set can do without; noted once if not."""
        if file not in self._present:
            self._present[file] = file.is_file()
            if not self._present[file]:
                self.problem(file, f"missing: {what}", blocking=False)
        return self._present[file]

    def text(self, where: str, row: dict[str, Any], key: str) -> str:
        """A row's field as text, "" if there is none; noted if it is something else."""
        value = row.get(key, "")
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value).strip()
        self.problem(where, f"{key}: expected a text, got {shown(value)}")
        return ""

    def add(self, splits: Splits, split: str, where: str, sample: Sample | None, why: str = "no image named") -> None:
        """Count a row of a split, and keep its sample if it has an image, a question and an answer.

        `why`: what is wrong where there is no sample.
        """
        self.rows[split] += 1
        kept = splits.setdefault(split, [])
        empty = [key for key in ("prompt", "answer") if not getattr(sample, key)] if sample else []
        if sample and not empty:
            kept.append(sample)
            return
        if sample:
            why = f"no {' and no '.join(empty)}"
            self.problem(where, f"{sample.id:.60} has {why}: left out", blocking=False)
        self.left_out[why] += 1

    def all_problems(self) -> tuple[Problem, ...]:
        """Everything noted; of a missing image once, with the count of rows that name it."""
        missing = []
        for name, counts in sorted(self._missing.items()):
            needed = ", ".join(f"{count} rows of {where}" for where, count in counts.items())
            missing.append(Problem(name, f"missing; named by {needed}"))
        return (*self.problems, *(self._packed() if missing else ()), *missing)

    def _packed(self) -> Iterator[Problem]:
        """Files in the folder that may hold what is missing."""
        for file in sorted(self.folder.iterdir()):
            name = file.name.lower()
            one_file = name.endswith(".gz") and not name.endswith(".tar.gz")  # a table or a volume, read as it is
            if name.endswith(PACKED) and not one_file and file.is_file():
                yield Problem(file.name, "packed, and images are missing: unpack it here")
