"""`a3tune env`: what a report of a problem should say of the machine; no path, no name of a user or host."""

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from a3tune.run.folder import environment

_EXTRA = re.compile(r"""([\w.-]+)[^;]*;.*\bextra\s*==\s*["']([\w-]+)["']""")
"""A package that an extra brings, in the metadata of an installed package."""


def describe_environment() -> Iterator[str]:
    """Lines: versions, devices, and what is there of each extra."""
    found = environment()
    packages = found["packages"]
    yield f"a3tune {packages.pop('a3tune')}, Python {found['python']}, {found['platform']}"
    yield ", ".join(f"{name} {number}" for name, number in packages.items())
    yield f"{found['processors']} processors, {found['threads']} threads for PyTorch"
    yield f"accelerators: {', '.join(found['accelerators']) or 'none'}"
    for extra, names in extras(requires("a3tune") or ()).items():
        installed = [f"{name} {number}" if (number := _version(name)) else f"no {name}" for name in names]
        yield f"extra {extra}: {', '.join(installed)}"


def extras(requirements: list[str] | tuple[str, ...]) -> dict[str, list[str]]:
    """The packages of each extra, of requirements as an installed package states them."""
    found: dict[str, list[str]] = {}
    for requirement in requirements:
        if match := _EXTRA.match(requirement):
            found.setdefault(match[2], []).append(match[1])
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
