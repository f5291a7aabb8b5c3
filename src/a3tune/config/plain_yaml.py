"""YAML as settings need it: scalars of YAML 1.2, no key twice, no references, no code.

Knows text and plain values; no settings.
"""

import re
from typing import Any

import yaml
from yaml import YAMLError as Error
from yaml.composer import ComposerError

__all__ = ["Error", "dump", "load"]


def load(text: str) -> Any:
    """The value of a text. Raises `Error` for one that is no YAML, or has what settings do not need."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except Error:
        raise
    except Exception as error:  # its constructors raise what they like: of `!!int x`, of endless nesting
        raise Error(f"a value cannot be read ({type(error).__name__})") from None


def dump(value: Any) -> str:
    """Text that `load` reads back as an equal value, made of mappings, lists and plain values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of its version 1.2: 2e-4 is a number, 12:30 and 2024-01-02 are text; a key stands once.

    Without references: ten lines of them can stand for more values than any memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(
                None, None, "references such as *name are not read, repeat the value", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the text that `_Loader` would take for something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Unicode's own line ends are folded to a space unless they are escaped.
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _name, (_pattern, _first) in _SCALARS.items():
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)
