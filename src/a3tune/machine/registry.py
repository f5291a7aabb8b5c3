"""Names and what they stand for, imported on first use. Knows no name.

Whoever needs only the names does not wait for slow imports (PyTorch, transformers).
"""

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import TypeVar, cast

T = TypeVar("T")


class Registry(MutableMapping[str, T]):
    """Like a dict, in the order of entry. An entry is given as its place, or, as in any dict, as the thing itself.

    Args:
        places: name -> `module:name` of what it stands for.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._entries: dict[str, str | T] = dict(places)

    def __getitem__(self, name: str) -> T:
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, member = entry.partition(":")
            self._entries[name] = entry = cast(T, getattr(import_module(module), member))
        return entry

    def __setitem__(self, name: str, value: T) -> None:
        self._entries[name] = value

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries
