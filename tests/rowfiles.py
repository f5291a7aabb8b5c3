"""Files of rows that tests write."""

import json
from pathlib import Path


def written(path: Path, data: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl" and isinstance(data, list)
    path.write_text("\n".join(map(json.dumps, data)) if lines else json.dumps(data))
    return path
