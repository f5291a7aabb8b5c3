"""Names of data that tell nothing of where they are."""

from collections.abc import Sequence
from hashlib import sha256

from a3tune.data.sets import DATA_SETS
from a3tune.types import Sample


def public_data(samples: Sequence[Sample]) -> str:
    """A name for rows that tells nothing of where they are: what they are by their content, and its hash.

    Rows are of one of the paper's data sets if all have the ids that `data prepare` gives its rows.
    """
    text = "\0".join(f"{sample.id}\0{sample.prompt}\0{sample.answer}" for sample in samples)
    content = f"(hash {sha256(text.encode('utf-8', 'replace')).hexdigest()[:8]})"
    names = {_set_of(sample.id) for sample in samples}
    name = names.pop() if len(names) == 1 else None
    return f"{DATA_SETS[name].title if name else 'Own questions'} {content}"


def _set_of(row: str) -> str | None:
    """The data set whose prepared rows have ids of this kind; some names begin with another."""
    return max((name for name in DATA_SETS if row.startswith(f"{name}-")), key=len, default=None)
