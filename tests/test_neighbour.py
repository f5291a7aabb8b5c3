"""A run folder of a stranger, whose settings name all that can be named: no command touches any of it.

Whatever is opened, listed, started or asked for over the network is told by the interpreter's own audit events.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from a3tune.adapters import add_adapter
from a3tune.cli import app
from a3tune.config import AdapterConfig, RunConfig, dump_config, load_config
from a3tune.config.settings import LABEL_MAKING
from a3tune.models import base_folder
from a3tune.run.folder import RunFolder
from a3tune.run.neighbour import TAKEN, taken_over
from a3tune.vlm.load import load_vlm

_WATCHED = {"open", "os.listdir", "os.scandir", "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "os.exec"}
_seen: list[tuple[str, str]] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in _WATCHED:
        _seen.append((event, str(arguments)))


sys.addaudithook(_hook)


@pytest.fixture
def seen() -> Iterator[list[tuple[str, str]]]:
    """(event, what) of everything that happens meanwhile."""
    global _seen
    _seen = []
    yield _seen
    _seen = None


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    return result


def rows(path: Path, image: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [
        {"id": "1", "image": str(image), "prompt": "Is it?", "answer": "yes", "regions": [{"box": [2, 2, 20, 20]}]},
        {"id": "2", "image": str(image), "prompt": "Describe it.", "answer": "A mass.", "answer_type": "report"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return path


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory, vlm_folder: Path) -> Path:
    """Two evaluated runs with adapters, `lora` and `mine`, of rows in a folder of their own."""
    folder = tmp_path_factory.mktemp("honest")
    (folder / "rows").mkdir()
    Image.new("RGB", (48, 48), "grey").save(folder / "rows" / "a.png")
    data = rows(folder / "rows" / "test.jsonl", Path("a.png"))
    kinds: dict[str, Literal["lora", "a3moe"]] = {"lora": "lora", "mine": "a3moe"}
    for name, kind in kinds.items():
        one = RunFolder.create(folder / name)
        settings = AdapterConfig(kind, rank=2, expert_rank=2, query_experts=2, key_experts=2)
        adapted = add_adapter(load_vlm(vlm_folder, device="cpu").model, settings)
        adapted.save_pretrained(str(one.adapter))
        one.write_config(load_config(None, [f"model.path={vlm_folder}", "evaluation.max_new_tokens=2"]))
        result = run("eval", data, "--adapter", one.adapter, "--out", one.path)
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A folder of the user that nobody but the user may name: a program, models, labels, rows, a picture."""
    folder = tmp_path / "canary"
    for name in ("radgraph/config.json", "radgraph/weights.th", "venv/bin/python", "labels/settings.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/trace\n")
        (folder / name).chmod(0o755)
    Image.new("RGB", (48, 48), "red").save(folder / "secret.png")
    rows(folder / "rows.jsonl", folder / "secret.png")
    return folder


@pytest.fixture(params=["here", "hub"])
def hostile(request: pytest.FixtureRequest, honest: Path, canary: Path, vlm_folder: Path, tmp_path: Path) -> Path:
    """Copies of the honest runs whose settings name the canary, and a model that is here or one of the Hub."""
    model = vlm_folder if request.param == "here" else "evil/model"
    named = [f"evaluation.weights.{name}={canary}" for name in ("radgraph", "ratescore", "bertscore", "chexbert")]
    named += [f"labels.{name}={canary}" for name in ("ranker", "weights")]
    named += [f"labels.store={canary / 'labels'}"]
    named += ["labels.proposer=sam", f"data.train={canary / 'rows.jsonl'}", f"model.path={model}"]
    for name in ("lora", "mine"):
        place = RunFolder(tmp_path / "hostile" / name)
        shutil.copytree(honest / name, place.path)
        strange = rows(tmp_path / "hostile" / "rows.jsonl", canary / "secret.png")
        settings = load_config(place.config, [*named, f"data.test={strange}", f"output={canary}"])
        place.write_config(settings)
        place.write_text(place.evaluation.name, dump_config(settings))
        about = json.loads((place.adapter / "adapter_config.json").read_text())
        (place.adapter / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": str(model)}))
    return tmp_path / "hostile"


def commands(hostile: Path, honest: Path, out: Path) -> dict[str, list[object]]:
    data, adapter, image = honest / "rows" / "test.jsonl", hostile / "mine" / "adapter", honest / "rows" / "a.png"
    return {
        "eval": ["eval", data, "--adapter", adapter, "--out", out / "evaluated"],
        "eval both": ["eval", data, "--adapter", "none", "--adapter", adapter, "--out", out / "evaluated"],
        "ask": ["ask", "Where?", "--image", image, "--adapter", adapter, "--out", out / "heat.png"],
        "app": ["app", "--adapter", adapter],
        "merge": ["merge", hostile / "lora" / "adapter", "--out", out / "merged"],
        "compare": ["compare", hostile / "lora", hostile / "mine", "--data", data, "--out", out / "table.md"],
        "report": ["report", hostile / "lora", hostile / "mine", "--data", data, "--out", out / "report.html"],
    }


@pytest.mark.parametrize("command", ["eval", "eval both", "ask", "app", "merge", "compare", "report"])
def test_a_strangers_settings_touch_nothing(command, hostile, honest, canary, tmp_path, seen, monkeypatch):
    served: list[RunConfig] = []
    pytest.importorskip("gradio") if command == "app" else None
    monkeypatch.setattr("a3tune.app.server.serve", lambda config, *rest: served.append(config), raising=False)
    hub = "evil/model" in (hostile / "mine" / "config.yaml").read_text()
    seen.clear()
    result = run(*commands(hostile, honest, tmp_path)[command])
    # A page shows numbers of training rows and labels: answers without an image, recall. It draws none of them.
    read = [str(canary / name) for name in ("rows.jsonl", "labels")] if command == "report" else []
    touched = [one for one in seen if str(canary) in one[1] and not any(path in one[1] for path in read)]
    assert touched == []
    assert [one for one in seen if one[0].startswith("socket.get")] == []
    assert not (tmp_path / "trace").exists()
    if hub and command not in ("compare", "report"):
        assert result.exit_code == 2
        assert "nothing is downloaded" in result.stderr and "evil/model" in result.stderr
    else:
        assert result.exit_code == 0, result.output
    for config in served:
        assert config.labels == RunConfig().labels and config.evaluation.weights == {}


def test_a_page_draws_no_image_that_only_a_stranger_names(hostile, canary, tmp_path, seen):
    """Without rows of the user's: those that the run names are read, and no picture of them is drawn."""
    out = tmp_path / "report.html"
    result = run("report", hostile / "lora", hostile / "mine", "--out", out)
    assert result.exit_code == 0, result.output
    assert "no cases" in result.stderr and "labels.ranker" in result.stderr
    assert [one for one in seen if str(canary / "secret.png") in one[1]] == []
    assert "Cases side by side" not in out.read_text()


@pytest.mark.parametrize("fragment", ["", "#frame=0"])
def test_a_link_in_the_folder_of_the_rows_leads_nowhere(honest, canary, tmp_path, fragment):
    shutil.copytree(honest / "rows", tmp_path / "rows")
    rows(tmp_path / "rows" / "test.jsonl", Path(f"a.png{fragment}"))
    (tmp_path / "rows" / "a.png").unlink()
    (tmp_path / "rows" / "a.png").symlink_to(canary / "secret.png")
    shutil.copytree(honest / "mine", tmp_path / "strange")
    settings = load_config(tmp_path / "strange" / "evaluation.yaml", [f"data.test={tmp_path / 'rows' / 'test.jsonl'}"])
    (tmp_path / "strange" / "evaluation.yaml").write_text(dump_config(settings))
    result = run("report", honest / "lora", tmp_path / "strange", "--out", tmp_path / "report.html")
    assert result.exit_code == 0 and "no cases" in result.stderr


@pytest.mark.parametrize("command", ["report", "compare"])
def test_rows_that_are_no_file_are_refused(command, honest, tmp_path):
    shutil.copytree(honest / "mine", tmp_path / "strange")
    settings = load_config(tmp_path / "strange" / "evaluation.yaml", ["data.test=/dev/zero"])
    (tmp_path / "strange" / "evaluation.yaml").write_text(dump_config(settings))
    result = run(command, tmp_path / "strange")
    assert result.exit_code == 2 and "expected a file or a folder" in result.stderr


def test_a_run_of_ones_own_is_drawn_as_before(honest, tmp_path):
    """Without options where images lie by their rows; with --data wherever they lie."""
    out = tmp_path / "report.html"
    result = run("report", honest / "lora", honest / "mine", "--out", out)
    assert result.exit_code == 0 and result.stderr == "" and "Cases side by side" in out.read_text()
    apart = rows(tmp_path / "apart" / "test.jsonl", honest / "rows" / "a.png")
    for given, cases in (((), False), (("--data", apart), True)):
        for name in ("lora", "mine"):
            shutil.copytree(honest / name, tmp_path / name, dirs_exist_ok=True)
            settings = load_config(tmp_path / name / "evaluation.yaml", [f"data.test={apart}"])
            (tmp_path / name / "evaluation.yaml").write_text(dump_config(settings))
        result = run("report", tmp_path / "lora", tmp_path / "mine", "--out", out, "--force", *given)
        assert result.exit_code == 0 and ("Cases side by side" in out.read_text()) is cases


def test_a_model_in_the_cache_of_the_hub_is_taken_without_asking(honest, vlm_folder, tmp_path, monkeypatch, seen):
    """A run of one's own on a model of the Hub is evaluated as before, and offline."""
    snapshot = tmp_path / "hub" / "models--own--model" / "snapshots" / "abc"
    shutil.copytree(vlm_folder, snapshot)
    (tmp_path / "hub" / "models--own--model" / "refs").mkdir()
    (tmp_path / "hub" / "models--own--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert base_folder("own/model") == snapshot
    shutil.copytree(honest / "mine", tmp_path / "mine")
    settings = load_config(tmp_path / "mine" / "config.yaml", ["model.path=own/model"])
    (tmp_path / "mine" / "config.yaml").write_text(dump_config(settings))
    adapter = tmp_path / "mine" / "adapter"
    result = run(
        "ask", "Where?", "--image", honest / "rows" / "a.png", "--adapter", adapter, "--out", tmp_path / "h.png"
    )
    assert result.exit_code == 0 and result.stderr == ""
    assert [one for one in seen if one[0].startswith("socket.get")] == []
    (snapshot / "model.safetensors").unlink()
    assert base_folder("own/model") is None


def test_every_setting_is_decided():
    """A new setting is left out until it is listed; docs/security.md names those that stay so."""
    left = {
        section: {field.name for field in fields(getattr(RunConfig(), section))} - set(names)
        for section, names in TAKEN.items()
    }
    for section, names in TAKEN.items():
        assert set(names) <= {field.name for field in fields(getattr(RunConfig(), section))}
    assert {section: names for section, names in left.items() if names} == {
        "labels": {*LABEL_MAKING, "store", "workers", "backend"},
        "training": {"report_to"},
        "evaluation": {"weights", "occlude"},
    }
    assert set(TAKEN) == {field.name for field in fields(RunConfig())} - {"data", "output"}


def test_what_the_user_says_counts():
    theirs = load_config(None, ["evaluation.weights.radgraph=a", "labels.ranker=b", "alignment.heads=0.5"])
    said = load_config(None, ["evaluation.weights.chexbert=c"])
    settings, left_out = taken_over(theirs, said, labels=True)
    assert left_out == ["labels.ranker", "evaluation.weights"]
    assert settings.evaluation.weights == {"chexbert": "c"} and settings.labels.ranker == "tiny"
    assert settings.alignment.heads == 0.5
    assert taken_over(theirs, said, labels=False)[0].labels.ranker == "b"  # a record of the training
