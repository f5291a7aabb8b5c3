"""Prints the lowest versions that pyproject.toml allows, as constraints for pip.

`python tests/lowest.py app ray` adds those of extras. Needs nothing installed; pyproject.toml alone owns the bounds.
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
BOUND = re.compile(r"([\w.-]+)>=([\d.]+)(,<[\d.]+)?")


def lowest(extras: Sequence[str] = ()) -> Iterator[str]:
    """`name==version` of every requirement. Raises ValueError for one without a lower bound."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    for requirement in sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"]):
        if not (bound := BOUND.fullmatch(requirement)):
            raise ValueError(f"{PROJECT}: {requirement}: expected NAME>=VERSION, perhaps with ,<VERSION")
        yield f"{bound[1]}=={bound[2]}"


if __name__ == "__main__":
    print(*lowest(sys.argv[1:]), sep="\n")
