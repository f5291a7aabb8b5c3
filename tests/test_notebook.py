"""The notebook: stored clean, by public names only; and run from top to bottom (`make test-notebook` has Jupyter)."""

import ast
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import a3tune
from lookups import ROOT, check_import, check_prose

PATH = ROOT / "examples" / "look_and_answer.ipynb"
NEEDED = {"a3tune", "IPython", "matplotlib", "numpy", "pathlib", "PIL"}
"""What a3tune and Jupyter bring with them."""
NOTEBOOK: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_stored_without_what_a_run_leaves() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert "version" not in NOTEBOOK["metadata"]["language_info"]
    for cell in NOTEBOOK["cells"]:
        assert cell["metadata"] == {} and not cell.get("outputs") and cell.get("execution_count") is None, cell["id"]
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert not re.search(r"[\"'(=]/\w|\w:\\\\|https?://", "\n".join(CODE)), "a place of a machine or of the network"
    assert max(len(code.splitlines()) for code in CODE) <= 16


def test_it_asks_for_what_is_documented() -> None:
    config = SimpleNamespace(docs_dir=str(ROOT / "docs"), extra={})
    runpy.run_path(str(ROOT / "docs" / "links.py"))["on_config"](config)
    documented = {*config.extra["described"].values(), *(f"a3tune.{name}" for name in a3tune.__all__)}
    used: set[str] = set()
    for node in (node for code in CODE for node in ast.walk(ast.parse(code))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            check_import(PATH.name, node)
            base = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            used |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "a3tune":
            used.add(f"a3tune.{node.attr}")
    assert {name.split(".")[0] for name in used} == NEEDED
    ours = {name for name in used if name.startswith("a3tune.")}
    assert ours <= documented and len(ours) > 6


def test_what_its_text_names_is_there(tmp_path: Path) -> None:
    page = tmp_path / "text.md"
    page.write_text("\n\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] != "code"))
    assert check_prose(page, PATH.name) > 4


def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="make test-notebook")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    where = {"metadata": {"path": str(tmp_path)}}  # an empty folder
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 7
    (table,) = (data["text/markdown"] for data in shown if "text/markdown" in data)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:5]] == ["base", "lora", "aligned"]
    told = "".join(output.get("text", "") for output in outputs)
    assert "78 questions to learn from" in told and " 0 failed" in told and "Traceback" not in told
