"""Reports -> RadGraph's annotations. Runs alone: standard input `[[report, ...]]`, last line of output the list."""

import json
import sys

from radgraph import RadGraph  # pyright: ignore[reportMissingImports]

if __name__ == "__main__":
    (reports,) = json.load(sys.stdin)
    annotated = RadGraph(model_type="radgraph", model_cache_dir=".")(reports)
    print()
    print(json.dumps([{"entities": annotated[str(index)]["entities"]} for index in range(len(reports))]))
