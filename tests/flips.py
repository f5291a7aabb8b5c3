"""One bit flipped in a file that a3tune wrote: is it told, is it without effect, or does it give something else?

A `Kept` is a file with what a user gets out of it, by the functions that commands call. Files are put back after each
flip. Linux only, as `injection.py`, whose commands make the files.
"""

import hashlib
import json
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np

from a3tune.adapters import load_adapter
from a3tune.config import LabelsConfig, load_config
from a3tune.data.rows import read_rows
from a3tune.errors import A3TuneError
from a3tune.evaluation.predictions import read_cost, read_maps, read_predictions
from a3tune.labels.make import make_maker
from a3tune.labels.status import store_status
from a3tune.labels.store import LabelStore, label_images
from a3tune.labels.stored import read_quality
from a3tune.models import shipped
from a3tune.report.logs import read_log
from a3tune.run.folder import RunFolder, read_json
from a3tune.training.checkpoint import check_checkpoint, last_checkpoint, samples_of_step, state_of
from a3tune.vlm.load import load_vlm
from injection import MAIN, World, run

Outcome = Literal["told", "same", "other", "traceback"]
"""told: an error of ours. same: what it gives is what it gave before. other: something else, without a word."""


@dataclass(frozen=True)
class Kept:
    """Files of one kind, and what is read of them."""

    title: str
    files: list[Path]
    read: Callable[[], Any]
    """What a user gets; compared by its JSON."""
    text_of_users: bool = False
    """Settings that people edit: what is in them holds."""


def flip(path: Path, rng: Random) -> None:
    """Flip one bit somewhere in a file."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def outcomes(kept: Kept, count: int, seed: int = 0) -> Iterator[tuple[Outcome, str]]:
    """What `count` flips in the files of one kind lead to, and what was said."""
    rng = Random(f"{kept.title} {seed}")
    expected = _words(kept.read())
    for _ in range(count):
        path = rng.choice(kept.files)
        whole = path.read_bytes()
        flip(path, rng)
        try:
            found = _words(kept.read())
        except A3TuneError as error:
            yield "told", str(error)
        except Exception:
            yield "traceback", traceback.format_exc(limit=-3)
        else:
            yield ("same", "") if found == expected else ("other", str(path))
        finally:
            path.write_bytes(whole)


def make_files(folder: Path) -> list[Kept]:
    """Everything that the commands of `injection.MAIN` leave below a folder, a few small files of each kind."""
    world = World(folder / "world")
    for name in MAIN:
        (world.folder / name).mkdir()
        ended = run(MAIN[name], world.folder / name)
        assert ended.code == 0, ended.said
    places = {name: world.folder / name for name in MAIN}
    labels, trained, answered = places["label"] / "labels", places["train"] / "run", places["eval"] / "run"
    rows = world.folder / "inputs" / "data" / "rows.jsonl"
    return [
        *_labels(labels, rows),
        *_weights(trained, places["convert"] / "model"),
        *_runs(RunFolder(trained), RunFolder(answered)),
    ]


def _labels(store: Path, rows: Path) -> Iterator[Kept]:
    samples = list(read_rows(rows))
    maker = make_maker(LabelsConfig(query="{question} There?"), "cpu")

    def labels() -> Any:
        known = LabelStore(store)
        return [asdict(known.labels(sample, top_k=2)) for sample in samples]

    def labels_anew() -> Any:
        """Of another question about the same images."""
        copied = store.with_name("copied")
        try:
            shutil.copytree(store, copied)
            name = label_images(samples, maker, copied).settings
            return [asdict(LabelStore(copied, name).labels(sample, top_k=2)) for sample in samples]
        finally:
            shutil.rmtree(copied)

    def status() -> Any:
        found = store_status(store)
        if found.damaged:
            raise A3TuneError(f"damaged: {found.damaged}")
        return [asdict(settings) for settings in found.finished], found.shards

    settings = LabelStore(store).settings.name
    shards = {name: sorted((store / name).rglob("*.parquet")) for name in ("segments", "similarities", "embeddings")}
    yield Kept("shards of segments", shards["segments"], labels)
    yield Kept("shards of similarities", shards["similarities"], labels)
    yield Kept("shards of embeddings", shards["embeddings"], labels_anew)
    yield Kept("all shards, by `label status`", [shard for found in shards.values() for shard in found], status)
    yield Kept("`settings/` of a label store", sorted((store / "settings").glob("*.json")), labels)
    quality = sorted((store / "quality").glob("*.json"))
    yield Kept("`quality/` of a label store", quality, lambda: _quality(store, settings))


def _quality(store: Path, settings: str) -> Any:
    found = read_quality(store, settings, LabelsConfig().top_k)
    assert found is not None
    return {name: asdict(group) for name, group in found.items()}


def _weights(run: Path, converted: Path) -> Iterator[Kept]:
    adapter, checkpoints = run / "adapter", run / "checkpoints"
    (checkpoint,) = checkpoints.iterdir()

    def adapted() -> Any:
        model: Any = load_adapter(load_vlm(shipped("vlm"), device="cpu").model, adapter)
        return _weights_of(model), str(model.peft_config["default"].to_dict())

    def gone_on() -> Any:
        found = last_checkpoint(checkpoints)
        assert found is not None
        check_checkpoint(found)
        content = {path.name: _digest(path) for path in checkpoint.iterdir() if path.name != "digests.json"}
        return content, samples_of_step(found), state_of(found)["global_step"]

    def model() -> Any:
        vlm = load_vlm(converted, device="cpu")
        about = vlm.model.config.to_dict(), vlm.processor.to_dict(), vlm.tokenizer.get_vocab()
        return _weights_of(vlm.model), str(about)

    yield Kept("`adapter_model.safetensors`", [adapter / "adapter_model.safetensors"], adapted)
    yield Kept("`adapter_config.json`", [adapter / "adapter_config.json"], adapted)
    yield Kept("`digests.json` of an adapter", [adapter / "digests.json"], adapted)
    for path in sorted(checkpoint.iterdir()):
        if path.suffix != ".md":
            yield Kept(f"checkpoint: `{path.name}`", [path], gone_on)
    yield Kept("weights of a converted model", sorted(converted.glob("*.safetensors")), model)
    yield Kept("JSON of a converted model", sorted(converted.glob("*.json")), model)


def _runs(trained: RunFolder, answered: RunFolder) -> Iterator[Kept]:
    yield Kept(
        "`predictions.jsonl`",
        [answered.predictions],
        lambda: [[asdict(row) for row in read_predictions(answered)], asdict(read_cost(answered))],
    )
    maps = sorted(answered.maps.glob("*.safetensors"))
    yield Kept("`maps/*.safetensors`", maps, lambda: {name: values.tolist() for name, values in _maps(answered)})
    for path in (answered.results, answered.identity, answered.environment):
        if path.is_file():
            yield Kept(f"`{path.name}`", [path], lambda path=path: read_json(path, "make it again"))
    yield Kept("`a3tune.json`", [answered.path / "a3tune.json"], lambda: str(RunFolder.open(answered.path)))
    yield Kept("`metrics.jsonl`", [trained.metrics], lambda: read_log(trained.metrics), text_of_users=True)
    for path in (trained.config, answered.evaluation):
        yield Kept(f"`{path.name}`", [path], lambda path=path: str(load_config(path)), text_of_users=True)


def _maps(folder: RunFolder) -> list[tuple[str, np.ndarray]]:
    return sorted(read_maps(folder).items())


def _weights_of(model: Any) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        digest.update(name.encode() + values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _words(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
