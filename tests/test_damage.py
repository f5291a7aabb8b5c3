"""Files that are damaged and still read as well as before: labels, adapters, checkpoints, models."""

import json
import logging
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from a3tune.adapters import add_adapter, load_adapter
from a3tune.config import AdapterConfig
from a3tune.errors import A3TuneError, AdapterError, LabelError, ModelError, RunError
from a3tune.labels.make import LabelMaker
from a3tune.labels.rows import TABLES
from a3tune.labels.status import store_status
from a3tune.labels.store import LabelStore, label_images
from a3tune.machine.digests import DIGESTS, write_digests
from a3tune.machine.hashes import short_hash
from a3tune.training.checkpoint import check_checkpoint, last_checkpoint
from a3tune.training.train import train
from a3tune.vlm.load import load_vlm
from test_store import Brightness, Quarters, make_samples
from trainings import config_of, write_base


def flip(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


# Labels


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list, LabelMaker]:
    folder = tmp_path_factory.mktemp("labels")
    samples = make_samples(folder)
    proposer: Any = Quarters()
    ranker: Any = Brightness()
    maker = LabelMaker(proposer, ranker, query="{question}")
    label_images(samples, maker, folder / "store")
    return folder / "store", samples, maker


@pytest.mark.parametrize("table", ["segments", "similarities"])
def test_a_flipped_bit_in_a_shard_never_gives_other_labels(store, tmp_path: Path, table: str) -> None:
    whole, samples, _ = store
    shard = next((whole / table).rglob("*.parquet"))
    for seed in range(60):
        shutil.copytree(whole, tmp_path / "store", dirs_exist_ok=True)
        flip(tmp_path / "store" / shard.relative_to(whole), Random(seed))
        with pytest.raises(LabelError):
            labels = LabelStore(tmp_path / "store")
            [labels.labels(sample) for sample in samples]
        assert len(store_status(tmp_path / "store").damaged) == 1


def test_a_flipped_bit_in_the_embeddings_never_gives_other_similarities(store, tmp_path: Path) -> None:
    whole, samples, maker = store
    other = LabelMaker(maker.proposer, maker.ranker, query="bright {question}")
    shard = next((whole / "embeddings").rglob("*.parquet"))
    for seed in range(30):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "store")
        flip(tmp_path / "store" / shard.relative_to(whole), Random(seed))
        with pytest.raises(LabelError, match=shard.name):
            label_images(samples, other, tmp_path / "store")


def _as_earlier_versions_wrote_it(shard: Path, table: str) -> Path:
    rows = pq.read_table(shard)
    shard.unlink()
    keys = sorted(zip(*(rows[field].to_pylist() for field in TABLES[table][0].key), strict=True))
    old = shard.with_name(f"{short_hash(keys)}.parquet")
    pq.write_table(rows, old)
    return old


def test_stores_of_earlier_versions_still_load_and_their_values_are_checked(store, tmp_path: Path) -> None:
    whole, samples, _ = store
    shutil.copytree(whole, tmp_path / "store")
    shards = {
        table: [_as_earlier_versions_wrote_it(path, table) for path in list((tmp_path / "store" / table).rglob("*.p*"))]
        for table in TABLES
    }
    expected = [LabelStore(whole).labels(sample) for sample in samples]
    assert [LabelStore(tmp_path / "store").labels(sample) for sample in samples] == expected
    assert not store_status(tmp_path / "store").damaged
    (shard,) = shards["similarities"]
    rows = pq.read_table(shard)
    wrong = [row | {"similarity": [2.0] * len(row["similarity"])} for row in rows.to_pylist()]
    pq.write_table(pa.Table.from_pylist(wrong, schema=rows.schema), shard)
    with pytest.raises(LabelError, match="no cosine"):
        LabelStore(tmp_path / "store").labels(samples[0])
    assert store_status(tmp_path / "store").damaged == (shard,)


def test_a_shard_under_another_name_is_refused(store, tmp_path: Path) -> None:
    whole, samples, _ = store
    shutil.copytree(whole, tmp_path / "store")
    shard = next((tmp_path / "store" / "segments").rglob("*.parquet"))
    shard.rename(shard.with_name("0" * 32 + ".parquet"))
    with pytest.raises(LabelError, match="what its name says"):
        LabelStore(tmp_path / "store").labels(samples[0])


# Checkpoints and adapters


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and run, trained to its end."""
    base = write_base(tmp_path_factory.mktemp("base"))
    run = train(config_of(base, tmp_path_factory.mktemp("run") / "run", max_steps=2, save_steps=2), callbacks=())
    return base, run


@pytest.fixture
def run(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    """The same as it was before its adapter was saved."""
    shutil.copytree(trained[1], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    return tmp_path / "run"


def again(trained: tuple[Path, Path], run: Path) -> bytes:
    train(config_of(trained[0], run, max_steps=2, save_steps=2), callbacks=())
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "step.json", "adapter_config.json"])
def test_a_checkpoint_without_one_of_its_files_is_refused(trained, run: Path, name: str) -> None:
    (run / "checkpoints" / "checkpoint-2" / name).unlink()
    with pytest.raises(RunError, match=f"{name}: missing.*delete the folder"):
        again(trained, run)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "step.json"])
def test_so_is_one_of_an_earlier_version(trained, run: Path, name: str) -> None:
    checkpoint = run / "checkpoints" / "checkpoint-2"
    (checkpoint / DIGESTS).unlink()
    check_checkpoint(checkpoint)
    (checkpoint / name).unlink()
    with pytest.raises(RunError, match=f"{name}: missing.*delete the folder"):
        again(trained, run)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_checkpoint_of_another_step_is_refused(trained, run: Path, sealed: bool) -> None:
    checkpoint = run / "checkpoints" / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"global_step": 1}))
    if not sealed:
        (checkpoint / DIGESTS).unlink()
    with pytest.raises(RunError, match="damaged" if sealed else "state of step 1"):
        again(trained, run)


@pytest.mark.parametrize("value", ["7", "[]", "null", '"2"', "0", "-1", "1e400", "9" * 400, "true"])
@pytest.mark.parametrize("field", ["global_step", "max_steps", "log_history", None])
def test_a_state_of_other_types_is_not_one(run: Path, field: str | None, value: str, caplog) -> None:
    checkpoint = run / "checkpoints" / "checkpoint-2"
    (checkpoint / DIGESTS).unlink()
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    wrong = json.loads(value) if field is None else state | {field: json.loads(value)}
    (checkpoint / "trainer_state.json").write_text(json.dumps(wrong))
    with caplog.at_level(logging.WARNING):
        found = last_checkpoint(run / "checkpoints")
    if (field, value) == ("log_history", "[]") or (field == "max_steps" and value == "7"):
        assert found == checkpoint
    elif (field, value) == ("global_step", "7"):
        with pytest.raises(RunError, match="state of step 7"):
            check_checkpoint(checkpoint)
    else:
        assert found is None
        assert "checkpoint-2 is not whole" in caplog.text


@pytest.mark.parametrize("value", [7, [], None, {}, {"samples": "2"}, {"samples": 0}, {"samples": True}])
def test_a_step_file_of_other_types_is_refused(trained, run: Path, value: Any) -> None:
    checkpoint = run / "checkpoints" / "checkpoint-2"
    (checkpoint / DIGESTS).unlink()
    (checkpoint / "step.json").write_text(json.dumps(value))
    with pytest.raises(RunError, match=r"no valid step\.json"):
        again(trained, run)


def test_what_was_cut_short_is_told_and_the_one_before_is_taken(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = run / "checkpoints" / "checkpoint-2"
    shutil.copytree(whole, whole.with_name("checkpoint-3"))
    (whole.with_name("checkpoint-3") / DIGESTS).unlink()
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(run / "checkpoints") == whole
    assert "checkpoint-3 is not whole" in caplog.text


def test_an_empty_adapter_folder_is_not_finished(trained, run: Path) -> None:
    expected = (trained[1] / "adapter" / "adapter_model.safetensors").read_bytes()
    (run / "adapter").mkdir()
    assert again(trained, run) == expected


def test_an_incomplete_adapter_folder_is_refused_and_can_be_made_again(trained, run: Path) -> None:
    expected = again(trained, run)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"adapter_model\.safetensors.*delete .*adapter"):
        again(trained, run)
    shutil.rmtree(run / "adapter")
    assert again(trained, run) == expected


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", DIGESTS])
def test_a_flipped_bit_in_an_adapter_is_told(trained, tmp_path: Path, name: str) -> None:
    model = load_vlm(trained[0] / "model", device="cpu").model
    for seed in range(5):
        shutil.copytree(trained[1] / "adapter", tmp_path / "adapter", dirs_exist_ok=True)
        flip(tmp_path / "adapter" / name, Random(seed))
        with pytest.raises(AdapterError, match=r"(damaged|missing).*copy the adapter anew"):
            load_adapter(model, tmp_path / "adapter")
    shutil.copytree(trained[1] / "adapter", tmp_path / "adapter", dirs_exist_ok=True)
    load_adapter(model, tmp_path / "adapter")


def test_adapters_of_others_have_no_digests_and_load(vlm_folder: Path, tmp_path: Path) -> None:
    settings = AdapterConfig("lora", rank=2)
    add_adapter(load_vlm(vlm_folder, device="cpu").model, settings).save_pretrained(str(tmp_path))
    load_adapter(load_vlm(vlm_folder, device="cpu").model, tmp_path)


# Models


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_base_of_no_numbers_is_refused(vlm_folder: Path, tmp_path: Path, value: float) -> None:
    shutil.copytree(vlm_folder, tmp_path / "vlm")
    weights = load_file(vlm_folder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[-1] = value
    save_file(weights, tmp_path / "vlm" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="no numbers"):
        load_vlm(tmp_path / "vlm", device="cpu")


def test_a_damaged_model_of_ours_is_refused(vlm_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(vlm_folder, tmp_path / "vlm")
    write_digests(tmp_path / "vlm")
    load_vlm(tmp_path / "vlm", device="cpu")
    flip(tmp_path / "vlm" / "model.safetensors", Random(0))
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged"):
        load_vlm(tmp_path / "vlm", device="cpu")


@pytest.mark.parametrize("value", [0, -1, 10**9, 1.5, "4", [], {}, True])
@pytest.mark.parametrize("field", ["num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size"])
def test_a_model_of_no_size_is_refused(vlm_folder: Path, tmp_path: Path, field: str, value: Any) -> None:
    shutil.copytree(vlm_folder, tmp_path / "vlm")
    config = json.loads((vlm_folder / "config.json").read_text())
    config["text_config"][field] = value
    (tmp_path / "vlm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        load_vlm(tmp_path / "vlm", device="cpu")


def test_every_error_is_one_line(vlm_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(vlm_folder, tmp_path / "vlm")
    (tmp_path / "vlm" / "config.json").write_text("7")
    with pytest.raises(A3TuneError) as told:
        load_vlm(tmp_path / "vlm", device="cpu")
    assert "\n" not in str(told.value)
