"""Reports -> RadGraph's annotations. Runs alone: standard input `[[report, ...]]`, last line of output the list."""

import json
import sys

# Where pyright does not find the package, it may take our own radgraph.py in the folder above for it.
from radgraph import RadGraph  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

if __name__ == "__main__":
    (reports,) = json.load(sys.stdin)
    annotated = RadGraph(model_type="radgraph", model_cache_dir=".")(reports)
    print()
    print(json.dumps([{"entities": annotated[str(index)]["entities"]} for index in range(len(reports))]))
