"""SLAKE-shaped questions about a phantom scan.

Priors must not answer them: for each question type the answer is drawn first, uniformly over all answers the type has,
and then an organ of the scan for which it is true. The words of the question therefore say nothing about the answer;
only the region that they name does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from a3tune.data.phantom.anatomy import LESION_KINDS
from a3tune.data.phantom.scan import Lesion, Scan, has_room
from a3tune.types import AnswerType

NUMBERS = ("one", "two", "three")
TEMPLATES = {
    "modality": ("What modality is used to take this image?", "Which imaging modality is this?"),
    "body": ("Which part of the body does this image belong to?", "What part of the body is shown?"),
    "plane": ("What is the scanning plane of this image?", "In which plane was this image taken?"),
    "presence": ("Is there a lesion in the {organ}?", "Does the {organ} contain a lesion?"),
    "presence of kind": ("Is there {a_kind} in the {organ}?", "Does the {organ} contain {a_kind}?"),
    "kind": ("What kind of lesion is in the {organ}?", "What is the abnormality in the {organ}?"),
    "size": ("How large is the lesion in the {organ}?", "What is the size of the lesion in the {organ}?"),
    "position": ("In which part of the {organ} is the lesion?", "Where in the {organ} is the lesion?"),
    "count": ("How many lesions are in the {organ}?", "What is the number of lesions in the {organ}?"),
    "organ": ("Which organ contains the {kind}?", "In which organ is the {kind}?"),
}
GENERIC_TYPES = ("modality", "body", "plane")
CLOSED_TYPES = ("presence", "presence of kind")
LOCALISED_TYPES = tuple(name for name in TEMPLATES if name not in GENERIC_TYPES)
ANSWERS = {
    "presence": ("yes", "no"),
    "presence of kind": ("yes", "no"),
    "kind": LESION_KINDS,
    "size": ("small", "large"),
    "position": ("upper", "lower"),
    "count": NUMBERS,
}
ORGAN_TYPES = tuple(ANSWERS)
"""The types that name an organ and are answered by what is in it."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer, and the region that decides it."""

    type: str
    prompt: str
    answer: str
    answer_type: AnswerType
    organ: str
    """The organ that the question or the answer names; empty for questions about the whole image."""
    region: np.ndarray | None
    """bool [SIZE, SIZE]; None for questions about the whole image."""


def ask(scan: Scan, kind: str, rng: np.random.Generator) -> Question | None:
    """One question of a type about a scan, or None if the answer that was drawn is true of no organ in it."""
    if kind in GENERIC_TYPES:
        answer = {"modality": scan.modality, "body": scan.body, "plane": scan.plane}[kind]
        return Question(kind, _pick(TEMPLATES[kind], rng), answer, "open", "", None)
    drawn = _LOCALISED[kind](scan, rng)
    if drawn is None:
        return None
    answer, organ, lesion_kind, region = drawn
    prompt = fill(_pick(TEMPLATES[kind], rng), organ, lesion_kind)
    answer_type: AnswerType = "closed" if kind in CLOSED_TYPES else "open"
    return Question(kind, prompt, answer, answer_type, organ, region)


_T = TypeVar("_T")


def fill(template: str, organ: str = "", kind: str = "") -> str:
    """A template of `TEMPLATES` with its organ and lesion kind."""
    return template.format(organ=organ, kind=kind, a_kind=with_article(kind))


def with_article(noun: str) -> str:
    """ "a mass", "an abscess"."""
    return f"{'an' if noun.startswith(tuple('aeiou')) else 'a'} {noun}"


_Found = tuple[str, str, str, np.ndarray]
"""Answer, organ, lesion kind (or empty), deciding region."""


def _pick(options: Sequence[_T], rng: np.random.Generator) -> _T:
    return options[int(rng.integers(len(options)))]


def _in(scan: Scan, organ: str) -> list[Lesion]:
    return [lesion for lesion in scan.lesions if lesion.organ == organ]


def _about_organ(scan: Scan, rng: np.random.Generator, answer: str, true_of: Callable[[str], bool]) -> _Found | None:
    organs = [organ for organ in scan.hosts if true_of(organ)]
    if not organs:
        return None
    organ = _pick(organs, rng)
    return answer, organ, "", scan.organs[organ]


def _presence(scan: Scan, rng: np.random.Generator) -> _Found | None:
    answer = _pick(ANSWERS["presence"], rng)
    return _about_organ(scan, rng, answer, lambda organ: bool(_in(scan, organ)) == (answer == "yes"))


def _presence_of_kind(scan: Scan, rng: np.random.Generator) -> _Found | None:
    """Half of the "no" answers are organs with a lesion of another kind."""
    answer = _pick(ANSWERS["presence of kind"], rng)
    present = sorted({lesion.kind for lesion in scan.lesions})
    if not present:
        return None
    kind = _pick(present if answer == "yes" else LESION_KINDS, rng)
    other = answer == "no" and rng.random() < 0.5

    def fits(organ: str) -> bool:
        kinds = {lesion.kind for lesion in _in(scan, organ)}
        return kind in kinds if answer == "yes" else kind not in kinds and bool(kinds) == other

    drawn = _about_organ(scan, rng, answer, fits)
    return drawn and (drawn[0], drawn[1], kind, drawn[3])


def _kind(scan: Scan, rng: np.random.Generator) -> _Found | None:
    """The kinds are equally likely by construction, so the answer may be drawn among those that are there."""
    single = [lesions[0].kind for lesions in map(partial(_in, scan), scan.hosts) if len(lesions) == 1]
    if not single:
        return None
    answer = _pick(sorted(set(single)), rng)
    return _about_organ(scan, rng, answer, lambda organ: [lesion.kind for lesion in _in(scan, organ)] == [answer])


def _size(scan: Scan, rng: np.random.Generator) -> _Found | None:
    """Only organs with room for a large lesion are asked about."""
    answer = _pick(ANSWERS["size"], rng)

    def fits(organ: str) -> bool:
        return [lesion.size for lesion in _in(scan, organ)] == [answer] and has_room(scan.organs[organ], "large")

    return _about_organ(scan, rng, answer, fits)


def _position(scan: Scan, rng: np.random.Generator) -> _Found | None:
    """Only lesions clearly above or below the middle of their organ are asked about."""
    answer = _pick(ANSWERS["position"], rng)

    def fits(organ: str) -> bool:
        lesions = _in(scan, organ)
        if len(lesions) != 1:
            return False
        rows = np.nonzero(scan.organs[organ])[0]
        offset = (lesions[0].centre[0] - rows.mean()) / np.ptp(rows)
        return offset < -0.12 if answer == "upper" else offset > 0.12

    return _about_organ(scan, rng, answer, fits)


def _count(scan: Scan, rng: np.random.Generator) -> _Found | None:
    number = int(rng.choice(len(ANSWERS["count"]), p=_NUMBER_ODDS))
    return _about_organ(scan, rng, ANSWERS["count"][number], lambda organ: len(_in(scan, organ)) == number + 1)


def _organ(scan: Scan, rng: np.random.Generator) -> _Found | None:
    """Asked only if one organ has that kind and another organ has a lesion too; the region is the lesion itself."""
    kind = _pick(LESION_KINDS, rng)
    owners = {lesion.organ for lesion in scan.lesions if lesion.kind == kind}
    if len(owners) != 1 or len({lesion.organ for lesion in scan.lesions}) < 2:
        return None
    organ = owners.pop()
    region = np.any([lesion.mask for lesion in _in(scan, organ) if lesion.kind == kind], axis=0)
    return organ, organ, kind, region


_NUMBER_ODDS = (0.20, 0.30, 0.50)
"""Organs with many lesions are rarer: drawn more often, so that the answers come out about as frequent."""
_LOCALISED: dict[str, Callable[[Scan, np.random.Generator], _Found | None]] = {
    "presence": _presence,
    "presence of kind": _presence_of_kind,
    "kind": _kind,
    "size": _size,
    "position": _position,
    "count": _count,
    "organ": _organ,
}
