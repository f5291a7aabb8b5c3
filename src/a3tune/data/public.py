"""Names of data that tell nothing of where they are."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from a3tune.data.sets import DATA_SETS
from a3tune.types import Sample


def public_data(path: Path | None, samples: Sequence[Sample]) -> str:
    """A name for rows that tells nothing of where they are: of the paper's data sets their own, else a hash."""
    if path is not None and path.parent.name in DATA_SETS:
        return DATA_SETS[path.parent.name].title
    text = "\0".join(f"{sample.id}\0{sample.prompt}\0{sample.answer}" for sample in samples)
    return f"Own questions (hash {sha256(text.encode('utf-8', 'replace')).hexdigest()[:8]})"
