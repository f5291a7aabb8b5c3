"""JSON text -> plain values, refusing what JSON does not say clearly: a key given twice, NaN, half a character."""

import json
from typing import Any

from a3tune.errors import shown


def parse_json(text: str, *, constants: bool = False) -> Any:
    """The value of a JSON text; `constants` allows NaN and infinities, which many programs write.

    Raises:
        ValueError: it is no JSON, nested too deep, an object has a key twice, or a text holds half of a surrogate pair.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=float if constants else _refuse_constant)
        if "\\u" in text or not text.isascii():
            json.dumps(value, ensure_ascii=False).encode()  # refuses what no file can hold
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} is given twice in one object")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
