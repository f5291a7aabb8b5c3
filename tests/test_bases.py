"""Base models named on the Hub: fetched once, at a commit that is written down, looked at before their weights come."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from a3tune import bases
from a3tune.cli import app
from a3tune.convert import convert
from a3tune.data.phantom.dataset import write_phantom
from a3tune.errors import ModelError
from a3tune.models import base_folder, base_hashes, check_model
from a3tune.vlm.load import describe, load_vlm
from checkpoints import huatuo, llava_med, llava_med_15
from hubs import NOBODY, Hub, ask, serving

NAME = "own/vlm"
MED = "microsoft/llava-med-v1.5-mistral-7b"


@pytest.fixture
def hub(vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving() as hub:
        hub.add(f"models/{NAME}", vlm_folder)
        ask(monkeypatch, hub.address, tmp_path / "cache")
        yield hub


def downloads(hub: Hub) -> set[str]:
    return {Path(asked).name for asked in hub.asked if asked.startswith("GET") and "/resolve/" in asked}


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == code and "Traceback" not in result.output, result.output
    return result.output


def test_a_training_writes_down_the_commit_of_its_base(hub, tmp_path, monkeypatch):
    first = hub.add(f"models/{NAME}", {**contents(hub), "README.md": b"a card"}, "v2")
    data = write_phantom(tmp_path / "data", {"train": 2, "test": 1}, seed=3)
    shared = ["training.max_steps=1", "training.batch_size=2", "model.device=cpu", "labels.source=none"]
    settings = [*shared, f"data.train={data['train']}", "adapter.kind=lora", "adapter.rank=2"]
    run("train", *settings, f"model.path={NAME}@v2", "output=run")
    pinned = f"{NAME}@{first}"
    assert "README.md" not in downloads(hub) and bases.pinned(f"{NAME}@v2") == pinned
    assert json.loads(Path("run/environment.json").read_text())["base model"] == pinned
    adapter = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (NAME, first)
    card = Path("run/adapter/README.md").read_text()
    assert f"base_model: {NAME}\n" in card and f"load_vlm('{pinned}')" in card
    # The branch moves on; nobody is asked, and the run's base is what it was.
    hub.add(f"models/{NAME}", {**contents(hub), "config.json": b"{}"}, "v2")
    ask(monkeypatch, NOBODY, tmp_path / "cache")
    run("train", *settings, f"model.path={pinned}", "output=run")
    run("eval", data["test"], "--adapter", "run/adapter", "--out", "run", "evaluation.max_new_tokens=2")
    run("merge", "run/adapter", "--out", "merged")
    assert json.loads(Path("merged/merged.json").read_text())["base"] == pinned
    Path("run/config.yaml").unlink()  # an adapter that travels alone still knows its commit
    Path("alone").mkdir()
    for file in Path("run/adapter").iterdir():
        (Path("alone") / file.name).write_bytes(file.read_bytes())
    run("merge", "alone", "--out", "again")
    assert json.loads(Path("again/merged.json").read_text())["base"] == pinned


def contents(hub: Hub) -> dict[str, bytes]:
    return dict(hub.repositories[f"models/{NAME}"]["main"])


def test_what_describes_a_model_comes_without_its_weights(hub, vlm_folder):
    describe(NAME)
    assert "model.safetensors" not in downloads(hub) and base_folder(NAME) is None and base_hashes(NAME) == {}
    load_vlm(NAME, device="cpu")
    asked = len(hub.asked)
    assert base_hashes(NAME) == base_hashes(str(vlm_folder)) != {}
    load_vlm(NAME, device="cpu")
    assert len(hub.asked) == asked


def test_a_model_that_cannot_be_used_is_told_before_its_weights_come(hub, tmp_path):
    llava_med_15(tmp_path / "med")
    hub.add(f"models/{MED}", tmp_path / "med")
    convert_it = rf"a3tune convert {MED} --out models/llava-med-v1.5-mistral-7b`, then model.path=models/llava-med"
    with pytest.raises(ModelError, match=rf"model {MED}: a 'llava_mistral' of the original LLaVA code.*{convert_it}"):
        load_vlm(MED)
    hub.add("models/own/other", {"config.json": b'{"model_type": "qwen3"}', "model.safetensors": b"0"})
    with pytest.raises(ModelError, match="model_type 'qwen3' is not supported"):
        load_vlm("own/other")
    hub.add("models/own/empty", {"model.safetensors": b"0"})
    with pytest.raises(ModelError, match="own/empty: expected a model with a config"):
        load_vlm("own/empty")
    with pytest.raises(ModelError, match="own/vlm@v9: the Hugging Face Hub has no such revision"):
        load_vlm(f"{NAME}@v9")
    assert not [name for name in downloads(hub) if name.endswith((".safetensors", ".bin"))]
    described = {name: data for name, data in contents(hub).items() if name != "model.safetensors"}
    hub.add("models/own/pickled", described | {"pytorch_model.bin": b"0"})
    with pytest.raises(ModelError, match=r"own/pickled: expected model.safetensors, or .*pytorch_model.bin"):
        load_vlm("own/pickled")


@pytest.mark.parametrize("kind", ["llava_med_15", "huatuo", "llava_med"])
def test_a_folder_of_the_original_code_says_how_it_is_converted(kind, tmp_path):
    folder = tmp_path / "a model"
    if kind == "llava_med":
        llava_med(folder, tmp_path / "base", tmp_path / "tower")
    else:
        {"llava_med_15": llava_med_15, "huatuo": huatuo}[kind](folder)
    with pytest.raises(ModelError, match=rf"a3tune convert '{folder}' --out 'models/a model'") as told:
        check_model(str(folder))
    assert "\n" not in str(told.value)


def test_a_checkpoint_is_converted_by_its_name(hub, tmp_path):
    llava_med_15(tmp_path / "med")
    hub.add(f"models/{MED}", tmp_path / "med", "v2")
    said = run("convert", f"{MED}@v2", "--out", "models/med")
    assert "llava_med_15" in said
    convert(tmp_path / "med", tmp_path / "by hand")
    files = {path.name: path.read_bytes() for path in (tmp_path / "by hand").iterdir()}
    assert {path.name: path.read_bytes() for path in Path("models/med").iterdir()} == files
    load_vlm("models/med", device="cpu")


def test_a_delta_its_base_and_its_tower_by_their_names(hub, tmp_path):
    llava_med(tmp_path / "delta", tmp_path / "llama", tmp_path / "clip")
    names = {"delta": "ms/delta", "llama": "h/llama", "clip": "openai/clip"}
    for folder, name in names.items():
        hub.add(f"models/{name}", tmp_path / folder)
    # Told by the settings alone, before gigabytes are fetched.
    assert "Give the folder of LLaMA-7B" in run("convert", "ms/delta", "--out", "out", code=2)
    Path("there").mkdir()
    assert "is there already" in run("convert", "ms/delta", "--base", "h/llama", "--out", "there", code=2)
    assert not [name for name in downloads(hub) if name.endswith((".safetensors", ".bin"))]
    run("convert", "ms/delta", "--base", "h/llama", "--tower", "openai/clip", "--out", "out")
    convert(tmp_path / "delta", tmp_path / "by hand", base=tmp_path / "llama", tower=tmp_path / "clip")
    for path in (tmp_path / "by hand").iterdir():
        assert (Path("out") / path.name).read_bytes() == path.read_bytes()


def test_a_cache_that_lacks_a_shard_is_not_whole(tmp_path, monkeypatch):
    """As other programs fill it: no list of what belongs to the model but its index."""
    ask(monkeypatch, NOBODY, tmp_path / "cache")
    folder = tmp_path / "cache" / "models--own--sharded" / "snapshots" / "abc"
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {"config.json": "{}", "model.safetensors.index.json": json.dumps(index)} | {index["weight_map"]["a"]: "0"}
    for name, text in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("abc")
    assert bases.cached("own/sharded") is None
    (folder / index["weight_map"]["b"]).write_text("0")
    assert bases.cached("own/sharded") == folder


def test_out_of_reach(hub, tmp_path, monkeypatch):
    ask(monkeypatch, NOBODY, tmp_path / "cache")
    said = run("convert", NAME, "--out", "out", code=2)
    assert f"hf download {NAME} --local-dir DIR" in said and len(said.strip().splitlines()) == 1


def test_a_training_whose_base_is_out_of_reach_leaves_nothing(hub, tmp_path, monkeypatch):
    ask(monkeypatch, NOBODY, tmp_path / "cache")
    rows, out = write_phantom(tmp_path / "scans", {"train": 1})["train"], tmp_path / "run"
    said = run("train", f"model.path={NAME}", f"data.train={rows}", "labels.source=none", f"output={out}", code=2)
    assert f"hf download {NAME} --local-dir DIR" in said
    assert not out.exists()
