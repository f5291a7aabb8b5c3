"""Which structures does a text name? Knows words, no images."""

import re
from collections.abc import Iterable

_SIDES = ("left", "right")


def mentioned(text: str, names: Iterable[str]) -> list[str]:
    """The names whose structure the text names, in their own order.

    Words are compared without case, underscores and plural s; of overlapping names the longest counts ("lung cancer"
    does not name the lung). "lung" names both the left and the right lung, "left lung" and "lung_left" only the left.

        >>> mentioned("Is the left kidney bigger than the liver?", ["Liver", "kidney_left", "kidney_right", "Spleen"])
        ['Liver', 'kidney_left']
    """
    names = list(names)
    parts = {name: _side_and_words(name) for name in names}
    words = _words(text)
    free = [True] * len(words)
    named: set[str] = set()
    for wanted in sorted({wanted for _, wanted in parts.values() if wanted}, key=len, reverse=True):
        for at in range(len(words) - len(wanted) + 1):
            if tuple(words[at : at + len(wanted)]) != wanted or not all(free[at : at + len(wanted)]):
                continue
            free[at : at + len(wanted)] = [False] * len(wanted)
            side = words[at - 1] if at and words[at - 1] in _SIDES else ""
            named |= {
                name
                for name, (name_side, name_words) in parts.items()
                if name_words == wanted and side in ("", name_side)
            }
    return [name for name in names if name in named]


def _side_and_words(name: str) -> tuple[str, tuple[str, ...]]:
    words = _words(name)
    return next((word for word in words if word in _SIDES), ""), tuple(word for word in words if word not in _SIDES)


def _words(text: str) -> list[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words]
