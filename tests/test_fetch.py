"""Models that find and rank segments, named on the Hub: fetched once, told apart by commit, read offline."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from a3tune.cli import app
from a3tune.commands.settings import training_settings
from a3tune.config.public import public_name
from a3tune.errors import LabelError, ModelError
from a3tune.labels.fetch import model_folder, pinned
from a3tune.labels.stored import stored_settings
from a3tune.models import shipped
from hubs import NOBODY, Hub, ask, serving
from test_biomedclip import checkpoint
from test_biomedclip import save as save_biomedclip
from test_rows import ROW
from test_sam import sam_folders  # noqa: F401

SAM, CLIP = "facebook/sam", "own/clip"


@pytest.fixture
def hub(sam_folders, ranker_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sam_folders["sam"], "sam")
    Path("sam", "pytorch_model.bin").write_bytes(b"pickled")
    shutil.copytree(ranker_folder, "clip")
    with serving() as hub:
        hub.add(f"models/{SAM}", Path("sam"))
        hub.add(f"models/{CLIP}", Path("clip"))
        weights = load_file("clip/model.safetensors")
        save_file({name: value + 0.1 for name, value in weights.items()}, "clip/model.safetensors", {"format": "pt"})
        hub.add(f"models/{CLIP}", Path("clip"), "v2")
        ask(monkeypatch, hub.address, tmp_path / "cache")
        yield hub


def label(*settings: str, code: int = 0) -> str:
    if not Path("rows.jsonl").exists():
        from test_importing import png

        png(Path("a.png"), 9)
        Path("rows.jsonl").write_text(json.dumps(ROW | {"image": "a.png"}))
    result = CliRunner().invoke(app, ["label", "rows.jsonl", "--out", "labels", *settings])
    assert result.exit_code == code and "Traceback" not in result.output, result.output
    return result.output


def test_labels_by_models_of_the_hub(hub, tmp_path, monkeypatch):
    chosen = ("labels.proposer=sam", f"labels.weights={SAM}", "labels.proposal={points_per_side: 2, min_iou: 0}")
    label(*chosen, f"labels.ranker={CLIP}")
    (stored,) = stored_settings(Path("labels"))
    assert (stored.given["weights"], stored.given["ranker"]) == (pinned(SAM), pinned(CLIP))
    assert pinned(CLIP) == f"{CLIP}@{model_folder(CLIP).name}" != CLIP
    assert not [asked for asked in hub.asked if ".bin" in asked]
    asked = len(hub.asked)
    assert "0 of them cut into segments now; 0 rankings" in label(*chosen, f"labels.ranker={stored.given['ranker']}")
    assert len(hub.asked) == asked and len(stored_settings(Path("labels"))) == 1
    assert "0 of them cut into segments now; 1 rankings" in label(*chosen, f"labels.ranker={CLIP}@v2")
    assert {one.given["ranker"] for one in stored_settings(Path("labels"))} == {pinned(CLIP), pinned(f"{CLIP}@v2")}
    ask(monkeypatch, NOBODY, tmp_path / "cache")
    said = [f"labels.ranker={CLIP}@v2", "labels.store=labels"]
    assert training_settings(None, said).labels.weights == Path(pinned(SAM))
    with pytest.raises(LabelError, match=f"labels.ranker={pinned(CLIP)} or labels.ranker={CLIP}@"):
        training_settings(None, ["labels.store=labels"])
    ask(monkeypatch, NOBODY, tmp_path / "empty")  # labels that were made elsewhere: known by name
    assert training_settings(None, [f"labels.ranker={stored.given['ranker']}", "labels.store=labels"]).labels.top_k == 4
    with pytest.raises(LabelError, match=f"labels.ranker is {CLIP}@v3, which is not the model that theirs were"):
        training_settings(None, [f"labels.ranker={CLIP}@v3", "labels.store=labels"])


def test_biomedclip_as_published_and_what_has_no_safetensors(hub, tmp_path):
    torch.manual_seed(0)
    hub.add("models/ms/BiomedCLIP", save_biomedclip(tmp_path / "b", checkpoint(), pickled=True))
    folder = model_folder("ms/BiomedCLIP")
    assert {"open_clip_config.json", "open_clip_pytorch_model.bin", "tokenizer.json"} <= {
        p.name for p in folder.iterdir()
    }
    label("labels.ranker=ms/BiomedCLIP")
    hub.add("models/old/clip", {"config.json": b"{}", "pytorch_model.bin": b"", "flax_model.msgpack": b""})
    with pytest.raises(ModelError, match=r"old/clip: expected model.safetensors in it.*pytorch_model.bin; other forms"):
        model_folder("old/clip")


def test_what_a_user_is_told(hub, monkeypatch, tmp_path):
    assert "superpixels: needs no weights" in label(f"labels.weights={SAM}", code=2) and hub.asked == []
    ask(monkeypatch, NOBODY, tmp_path / "empty")
    for setting in ("labels.ranker=own/clip", f"labels.proposer=sam labels.weights={SAM}"):
        said = label(*setting.split(), code=2)
        assert "cannot be reached" in said and "hf download" in said and len(said.splitlines()) == 1
    Path("here").mkdir()
    assert "expected the folder of a ranker" in label("labels.ranker=here/clip", code=2)
    assert not Path("labels").exists()


def test_names():
    assert model_folder("tiny") == shipped("ranker") and pinned("tiny") == "tiny"
    assert model_folder("no/such", download=False) == Path("no/such") and pinned(Path("no/such")) == "no/such"
    assert public_name("own/clip@v2") == "own/clip@v2" and public_name("/home/x/clip") == "clip"
