"""What docs/security.md promises: nothing foreign is run, fetched, obeyed, or followed out of its folder."""

import csv
import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from a3tune.cli import main
from a3tune.cli.app import echo
from a3tune.config import ModelConfig, RunConfig, dump_config, load_config
from a3tune.convert.stream import open_checkpoint
from a3tune.data.annotations import attach_regions
from a3tune.data.images import load_image
from a3tune.data.rows import read_rows
from a3tune.errors import ConfigError, DataError, ModelError
from a3tune.evaluation.predictions import Cost
from a3tune.metrics.stats import Estimate
from a3tune.report.card import model_card
from a3tune.report.escape import latex, markdown, spreadsheet
from a3tune.report.formats import FORMATS, written
from a3tune.report.html import render
from a3tune.report.records import ReportData, RunResult
from a3tune.report.table import comparison_table
from a3tune.run.folder import environment
from a3tune.text import one_line, visible
from a3tune.types import Sample
from a3tune.vlm.load import load_vlm

SOURCE = Path(__file__).parents[1] / "src" / "a3tune"
HOSTILE = ["=cmd|'/c calc'!A1", "a|b", "a\nb\\input{/etc/passwd}", "<script>alert(1)</script>", "[x](http://host)"]
HOSTILE += ["![x](http://host/p.png)", "---\nbase_model: other", "\x1b[2J", "\u202egnp.exe", "a\\|b", "$x^2_~#%&{}"]


class Harm:
    """Pickled, this runs a command when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


def model_folder(folder: Path, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"} | config))
    return folder


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    folder = model_folder(tmp_path / "model")
    torch.save({"weight": Harm(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(trace)))
    for read in (open_checkpoint, load_vlm):
        with pytest.raises(ModelError):
            read(folder)
    assert not trace.exists()


def test_code_of_a_checkpoint_is_not_run(tmp_path, vlm_folder):
    trace = tmp_path / "trace"
    folder = tmp_path / "model"
    folder.mkdir()
    for file in vlm_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(trace)!r})\nclass A: pass\n")
    auto = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"), "code.A")}
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | auto | {"model_type": content.get("model_type", "llava")}))
    load_vlm(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of"} | auto))
    with pytest.raises(ModelError):
        load_vlm(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    "call", ["torch.load", "np.load", "pickle.load", "joblib", "yaml.load", "eval(", "exec(", "shell=True"]
)
def test_calls_that_may_run_what_they_read(call):
    """Each of the few uses says why it is safe: `weights_only`, or a loader of plain values."""
    lines = [
        line
        for file in SOURCE.rglob("*.py")
        for line in file.read_text().splitlines()
        if re.search(rf"(?<![\w.]){re.escape(call)}", line)
    ]
    safe = ("weights_only=True", "# a SafeLoader", "model.eval(")
    assert [line for line in lines if not any(mark in line for mark in safe)] == []


def test_nothing_asks_for_code_of_others():
    text = "".join(file.read_text() for file in SOURCE.rglob("*.py"))
    assert "trust_remote_code=True" not in text
    autos = re.findall(r"Auto[A-Z]\w*\.from_pretrained\([^)]*\)", text)
    assert len(autos) >= 6 and all("trust_remote_code=False" in call for call in autos)


def test_the_import_and_local_models_need_no_network(vlm_folder):
    everything = sorted(
        "a3tune." + ".".join(file.relative_to(SOURCE).with_suffix("").parts)
        for file in SOURCE.rglob("*.py")
        if "scripts" not in file.parts
    )
    code = f"""
import socket, importlib
def refuse(*args, **kwargs): raise SystemExit(f"a connection to {{args}}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
for name in {everything!r}: importlib.import_module(name.removesuffix(".__init__"))
from a3tune.vlm.load import load_vlm
for path in ("tiny", {str(vlm_folder)!r}): load_vlm(path)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_current_folder_brings_no_code(tmp_path):
    for name in ("torch", "typer", "json", "pathlib", "yaml", "a3tune_plugin", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'trace')!r})\n")
    (tmp_path / "matplotlibrc").write_text("backend: module://torch\ntext.usetex: True\n")
    code = "import a3tune.cli.runs, a3tune.reproduce.plots, a3tune.report.html"
    for arguments in (["-m", "a3tune", "--version"], ["-m", "a3tune", "ask", "x", "--image", "y", "--dry-run"]):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not (tmp_path / "trace").exists(), done.stderr[-2000:]


def test_a_plot_takes_no_settings_from_the_current_folder(monkeypatch):
    import matplotlib

    from a3tune.reproduce.experiments import experiments
    from test_plots import _drawn, _table

    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # as a matplotlibrc there would
    monkeypatch.setenv("PATH", "")
    _drawn(experiments()["fig9"], _table(experiments()["fig9"], experiments()["fig9"].columns))


# Names of files in annotations

OUTSIDE = ["../secret.png", "a/../../secret.png", "..\\secret.png", "file://{}", "{}", "http://host/../secret.png"]


@pytest.fixture
def outside(tmp_path):
    (tmp_path / "set").mkdir()
    for path in (tmp_path / "secret.png", tmp_path / "set" / "a.png"):
        Image.new("L", (8, 6)).save(path)
    return tmp_path


@pytest.mark.parametrize("name", OUTSIDE)
def test_annotations_do_not_lead_out_of_their_folder(outside, name):
    name = name.format(outside / "secret.png")
    sample = Sample("1", outside / "set" / "a.png", "Where is x?", "here", "open")
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2]}
    coco = {
        "images": [{"id": 1, "file_name": name, "height": 6, "width": 8}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [box],
    }
    value = {"x": 0, "y": 0, "width": 50, "height": 50, "rectanglelabels": ["x"]}
    result = {"type": "rectanglelabels", "value": value, "original_width": 8, "original_height": 6}
    studio = [{"data": {"image": name}, "annotations": [{"result": [result]}]}]
    for content in (coco, studio):
        (outside / "masks.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"leads out of it|neither in the samples nor beside"):
            attach_regions([sample], outside / "masks.json")


def test_a_users_own_rows_may_name_any_file_but_no_address(outside):
    row = {"id": "1", "image": str(outside / "secret.png"), "prompt": "x", "answer": "y"}
    path = outside / "set" / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert load_image(read_rows(path)[0].image).size == (8, 6)
    for kind in ("http", "file", "s3"):
        path.write_text(json.dumps(row | {"image": f"{kind}://host/a.png"}) + "\n")
        with pytest.raises(DataError, match=r"got an address.* nothing is downloaded"):
            read_rows(path)
    with pytest.raises(DataError, match="No such file"):
        load_image(Path("http://host/a.png"))


def test_an_index_of_shards_names_files_of_its_folder_only(tmp_path):
    folder = model_folder(tmp_path / "model")
    index = {"weight_map": {"a": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names no files of this folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("start", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1", b"\0\0\1\0\1\0"])
def test_formats_outside_of_the_list_are_not_decoded(start):
    with pytest.raises(DataError, match="format is not recognised"):
        load_image(start + bytes(200))


# Text that is shown


@given(st.text() | st.sampled_from(HOSTILE))
def test_terminals_are_shown_text_only(text):
    stream = io.StringIO()
    before, sys.stdout = sys.stdout, stream
    try:
        echo(text)
    finally:
        sys.stdout = before
    shown = stream.getvalue()
    shown.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)


def test_errors_are_shown_text_only(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["a3tune", "data", "check", "a\x1b]0;b\x07"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and r"a\x1b]0;b\x07" in shown


def tables(title: str, form: str) -> str:
    results = [RunResult(name, title, {"open_recall": Estimate(0.5, 0.4, 0.6, 9)}) for name in ("r", "m")]
    costs = dict.fromkeys("rm", Cost(1, 1, 1))
    return written([comparison_table(results, "r", title=own, costs=costs) for own in ("", title)], form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("title", HOSTILE)
def test_names_in_tables(title, form):
    """A name changes neither the shape of a table nor what is around it."""
    plain, text = tables("plain", form), tables(title, form)
    assert len(text.splitlines()) == len(plain.splitlines())
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    if form == ".csv":
        for row in csv.reader(io.StringIO(text)):
            assert not any(cell.startswith(("=", "@", "\t")) for cell in row)
    if form == ".md":
        assert "<script" not in text and not re.search(r"(?<!\\)\]\(", text)
        cells = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in text.splitlines()]
        assert cells == [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in plain.splitlines()]
    if form == ".tex":
        assert r"\input{" not in text


UNSEEN = [*"\x1b\x07\x9b\u202e\u2066\u061c\u200b\u200e\u2060\ufeff\u00ad\u3164\u2028", "\U000e0041", "\ud800"]
JOINED = "\u0645\u06cc\u200c\u062e \u0915\u094d\u200d\u0937 \U0001f468\u200d\U0001f469"


@pytest.mark.parametrize("letter", UNSEEN)
def test_text_is_visible_everywhere(letter):
    """Nothing unseen is left, and its code is there."""
    from a3tune.app.view import Html, notice

    text, code = f"be{letter}nign", ascii(letter)[1:-1]
    card = model_card(RunConfig(model=ModelConfig(path=text)), {text: 3})
    pages = [notice(text), Html("<p>{}</p>").format(text), visible(text), one_line(text), card]
    pages += [tables(text, form) for form in FORMATS] + [page_with(text)]
    for page in pages:
        assert letter not in page and page.encode()
        assert code.lstrip("\\") in page, page[:200]


def test_scripts_that_need_joiners_keep_them():
    assert visible(JOINED) == one_line(JOINED) == JOINED
    assert JOINED in page_with(JOINED)


def page_with(text: str) -> str:
    """A report that shows a text in a title, a setting and a note."""
    results = tuple(RunResult(name, text, {"open_recall": Estimate(0.5, 0.4, 0.6, 9)}) for name in ("r", "m"))
    return render(
        ReportData(
            title=text,
            results=results,
            reference="r",
            counts={"questions": 9},
            seeds=1,
            command=text,
            settings={text: text},
            seconds={},
            tau=0.15,
            normalisation="max",
            notes=(text,),
        )
    )


@given(st.text())
def test_escaped_text_is_one_line(text):
    for escape in (one_line, markdown, latex, spreadsheet):
        escape(text).encode()
        assert len(escape(text).splitlines()) <= 1


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_model_cards(name):
    card = model_card(RunConfig(model=ModelConfig(path=f"owner/{name}")), {name: 3})
    _, head, body = card.split("---\n", 2)
    body = re.sub("(?s)```python.*?```", "", body)
    assert set(yaml.safe_load(head)) <= {"library_name", "base_model", "pipeline_tag", "tags"}
    assert "<script" not in body and "```" not in body and not re.search(r"(?<!\\)\]\(http", body)


# What is kept


def test_the_environment_holds_no_secret_and_no_name(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("USER", "erika.mustermann")
    text = json.dumps(environment())
    assert "hf_secret" not in text and "erika" not in text
    assert socket.gethostname() not in text and str(Path.home()) not in text


def test_settings_are_plain_values(tmp_path):
    for text in ("!!python/object/apply:os.mkdir [trace]", "labels: {query: !!python/name:os.system }", "a: &a [*a]"):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ConfigError):
            load_config(tmp_path / "run.yaml")
    assert "python/" not in dump_config(RunConfig())
