"""One's own rows looked through as a whole: every row, image and region. `read_rows` stops at the first mistake."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from a3tune.data.images import load_image
from a3tune.data.rows import read_all
from a3tune.errors import A3TuneError
from a3tune.masks import region_mask
from a3tune.types import ImageSource, Sample


@dataclass(frozen=True, slots=True)
class RowsCheck:
    """What a file of rows holds. All rows are either usable or in `left_out`."""

    path: Path
    rows: int
    samples: tuple[Sample, ...]
    """Of the usable rows."""
    with_regions: int
    """Of the usable ones, rows whose regions are known."""
    images: int
    """Different images of the usable ones."""
    kinds: Mapping[str, int]
    """Usable rows by answer type."""
    problems: tuple[str, ...]
    """A line for each row that is not usable, and why."""

    @property
    def usable(self) -> int:
        return len(self.samples)

    @property
    def ok(self) -> bool:
        """Whether every row is usable."""
        return not self.problems


def check_rows(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> RowsCheck:
    """Read every row, open every image, compare every region with its image.

    Raises:
        DataError: the file cannot be read, or has no row.
    """
    samples, problems = read_all(path)
    sizes: dict[ImageSource, tuple[int, int] | str] = {}
    usable: list[Sample] = []
    for number, (where, sample) in enumerate(samples, start=1):
        if sample.image not in sizes:
            sizes[sample.image] = _size(sample.image)
        if problem := _problem(sample, sizes[sample.image]):
            problems.append(f"{where}: {problem}")
        else:
            usable.append(sample)
        progress(number, len(samples))
    return RowsCheck(
        path=path,
        rows=len(usable) + len(problems),
        samples=tuple(usable),
        with_regions=sum(bool(sample.regions) for sample in usable),
        images=len({sample.image for sample in usable}),
        kinds=Counter(sample.answer_type for sample in usable),
        problems=tuple(problems),
    )


def format_rows_check(check: RowsCheck) -> str:
    """A check as a few lines; the problems are told elsewhere."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(check.kinds.items()))
    return "\n".join(
        [
            f"{check.path}: {check.rows:,} rows, {check.usable:,} usable, {len(check.problems):,} not",
            f"answers: {kinds or 'none'}",
            f"{check.images:,} images; {check.with_regions:,} rows have regions",
        ]
    )


def _size(image: ImageSource) -> tuple[int, int] | str:
    """Height and width, or why it does not open."""
    try:
        opened = load_image(image)
    except A3TuneError as error:
        return str(error)
    return opened.height, opened.width


def _problem(sample: Sample, size: tuple[int, int] | str) -> str:
    if isinstance(size, str):
        return size
    for number, region in enumerate(sample.regions or ()):
        try:
            inside = region_mask(region, *size)
        except A3TuneError as error:
            return f"regions[{number}]: {error}"
        if not inside.any():
            return f"regions[{number}]: expected a mask of something, it covers no pixel"
        x0, y0, x1, y1 = region.box or (0, 0, 0, 0)
        if x0 < 0 or y0 < 0 or x1 > size[1] or y1 > size[0]:
            return (
                f"regions[{number}]: box {[x0, y0, x1, y1]} ends outside of the image of {size[1]} x {size[0]} pixels"
            )
    return ""
