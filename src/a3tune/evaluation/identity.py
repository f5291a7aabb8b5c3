"""What answers belong to, by content: rows and their images, base, weights, settings. Recorded beside the answers.

Names and places do not count. Rows may come on top; those that were there must be what they were.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from a3tune.data.content import other_part, row_contents
from a3tune.errors import RunError, shown
from a3tune.machine.digests import unsealed
from a3tune.machine.hashes import difference
from a3tune.models import base_hashes, weights_hash
from a3tune.run.folder import RunFolder
from a3tune.types import Sample

if TYPE_CHECKING:
    from a3tune.vlm.load import Vlm

PARTS = ("prompt", "answer", "answer_type", "regions", "meta", "image")
"""Of a row, that answers and scores depend on."""
_SETTINGS = "settings"
"""A name that identities of earlier versions do not have: theirs are settings only."""
_HINT = "choose another output folder"


@dataclass(frozen=True, slots=True)
class EvaluationIdentity:
    rows: Mapping[str, str]
    """Sample id -> `data.content.row_contents` of `PARTS`."""
    base: Mapping[str, str]
    """`models.base_hashes`: tokenizer, template and configurations among them; empty for a model made in memory."""
    weights: str = ""
    """`models.weights_hash` of base and adapter as they answer; empty: not compared."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Those that answers and their attention depend on."""


_IDENTITY = TypeAdapter(EvaluationIdentity)


def identity_of(vlm: "Vlm", samples: Sequence[Sample], settings: Mapping[str, Any]) -> EvaluationIdentity:
    """What the answers of a model to these samples belong to. Raises DataError for an image that cannot be read."""
    return EvaluationIdentity(rows_of(samples), base_hashes(vlm.name), weights_hash(vlm.model), settings)


def rows_of(samples: Sequence[Sample]) -> dict[str, str]:
    """`EvaluationIdentity.rows`."""
    return dict(zip((sample.id for sample in samples), row_contents(samples, PARTS), strict=True))


def record(folder: RunFolder, identity: EvaluationIdentity) -> None:
    """Write what the answers in `folder` belong to."""
    folder.write_json(folder.identity.name, asdict(identity))


def refuse_other(folder: RunFolder, now: EvaluationIdentity) -> None:
    """Raise RunError naming what is not as it was when the answers in `folder` were made."""
    then = read(folder)
    for name, value in now.settings.items():
        if then.settings.get(name) != value:
            earlier = then.settings.get(name)
            raise RunError(f"{folder.path}: holds an evaluation with {name}={earlier}, not {value}; {_HINT}")
    what = _other_base(then.base, now.base) or _other_row(then.rows, now.rows)
    if what is None and now.weights not in ("", then.weights):
        what = "the weights of the model are others"
    if what:
        raise RunError(f"{folder.path}: holds an evaluation of other content: {what}; {_HINT}")


def refuse_other_rows(folder: RunFolder, samples: Sequence[Sample], *, images: bool) -> None:
    """Raise RunError if the answers in `folder` are to other rows than these, as far as it knows; with `images`, or to
    other images. Raises DataError for an image that cannot be read."""
    if not is_recorded(folder):
        return
    parts, then = PARTS if images else PARTS[:-1], read(folder).rows
    for sample, content in zip(samples, row_contents(samples, parts), strict=True):
        if part := other_part(parts, " ".join(then.get(sample.id, "").split()[: len(parts)]), content):
            raise RunError(
                f"{folder.path}: the {part} of sample {shown(sample.id, 80)} is not the one that was evaluated. Put "
                "it back as it was, or evaluate again with another output"
            )


def refuse_unlike_rows(folders: Sequence[RunFolder]) -> None:
    """Raise RunError if answers in two folders are to other rows or images of one id, as far as they know."""
    known = [(folder, read(folder).rows) for folder in folders if is_recorded(folder)]
    for folder, rows in known[1:]:
        first, of_first = known[0]
        for name, content in rows.items():
            if part := other_part(PARTS, of_first.get(name, content), content):
                raise RunError(
                    f"{folder.path}: the {part} of sample {shown(name, 80)} was another than in {first.path}; evaluate "
                    "both on the same file and images"
                )


def is_recorded(folder: RunFolder) -> bool:
    """Whether answers know what they belong to; those of earlier versions do not."""
    return folder.identity.is_file() and _SETTINGS in _content(folder)


def read(folder: RunFolder) -> EvaluationIdentity:
    """What the answers in `folder` belong to. Raises RunError when nobody knows."""
    found = _content(folder)
    if _SETTINGS not in found:
        raise RunError(
            f"{folder.path}: holds an evaluation of an earlier version of a3tune, which did not record the content of "
            f"rows and weights, so that nobody knows whether they are the same; {_HINT}"
        )
    try:
        return _IDENTITY.validate_python(found)
    except ValueError:
        raise RunError(f"{folder.identity}: cannot be read, it is damaged; {_HINT}") from None


def _content(folder: RunFolder) -> dict[str, Any]:
    try:
        return unsealed(json.loads(folder.identity.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        raise RunError(
            f"{folder.predictions}: {folder.identity.name}, which says what it belongs to, is missing; {_HINT}"
        ) from None


def _other_base(then: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    file = difference(then, now) if now else None
    return file and f"of the base model {file}"


def _other_row(then: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    for name, content in then.items():
        if name not in now:
            return f"sample {shown(name, 80)} is not among those to evaluate"
        if part := other_part(PARTS, content, now[name]):
            return f"the {part} of sample {shown(name, 80)} is another"
    return None
