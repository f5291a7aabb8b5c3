"""Damaged run folders, adapters and checkpoints: read or refused with an error of ours, soon."""

import io
import json
import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from a3tune.adapters.peft import add_adapter, load_adapter
from a3tune.config import AdapterConfig
from a3tune.convert.sentencepiece import read_sentencepiece
from a3tune.convert.stream import open_checkpoint
from a3tune.evaluation.predictions import read_cost, read_maps, read_predictions
from a3tune.evaluation.results import summarise
from a3tune.report.gather import read_run
from a3tune.run.folder import RunFolder
from a3tune.types import Prediction, Sample
from a3tune.vlm.load import load_vlm
from fuzzing import altered, damaged, fuzz, lines, only_our_errors

_PREDICTION = asdict(Prediction("1", "Is it?", "yes", "closed", "no", {"organ": "liver"}, {"attention_mass": 0.5}, {}))
PREDICTION = _PREDICTION | {"cost": {"seconds": 1.0, "answer_seconds": 0.5, "passes": 3.0, "peak_bytes": None}}
MAP = save({"sample 1": np.zeros(6, np.float16)})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = RunFolder.create(tmp_path_factory.mktemp("run") / "r")
    (run.path / "maps").mkdir()
    return run


@fuzz
@given(
    damaged([lines([PREDICTION, PREDICTION | {"id": "2"}])]) | st.lists(altered([PREDICTION]), max_size=2).map(lines),
    damaged([MAP]) | st.just(MAP),
    st.just(b'{"step": 1, "loss_llm": 2.0}\n')
    | altered([{"step": 1, "heads_selected": [[1]]}]).map(lambda row: lines([row])),
)
def test_predictions(run, data, maps, log):
    run.predictions.write_bytes(data)
    (run.path / "maps" / "0000000.safetensors").write_bytes(maps)
    run.metrics.write_bytes(log)
    sample = Sample("1", Path("a.png"), "Is it?", "yes", "closed")
    with only_our_errors():
        read_cost(run)
        summarise(
            [sample], [item for item in read_predictions(run) if item.id == "1"][:1] or [Prediction(**_PREDICTION)]
        )
        read_maps(run)
        read_run("r", "r", run, [sample])


@fuzz
@given(altered([{"schema": 1, "a3tune": "0.1.0"}]) | damaged([b'{"schema": 1}']))
def test_markers_of_runs(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "marked"
    path.mkdir(exist_ok=True)
    (path / "a3tune.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with only_our_errors():
        RunFolder.open(path)


# Adapters and checkpoints


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, vlm_folder: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapter")
    settings = AdapterConfig(rank=2, expert_rank=2, query_experts=2, key_experts=2)
    add_adapter(load_vlm(vlm_folder).model, settings).save_pretrained(folder)
    return vlm_folder, folder


@pytest.mark.filterwarnings("ignore")  # PEFT warns of settings that it does not know, or that fit nothing
@settings(fuzz, max_examples=fuzz.max_examples // 2)
@given(st.data())
def test_adapters(adapter, tmp_path_factory, data):
    base, whole = adapter
    place = tmp_path_factory.getbasetemp() / "damaged_adapter"
    place.mkdir(exist_ok=True)
    weights = (whole / "adapter_model.safetensors").read_bytes()
    config = json.loads((whole / "adapter_config.json").read_text())
    if data.draw(st.booleans()):
        weights = data.draw(damaged([weights[: 8 + struct.unpack("<Q", weights[:8])[0]]])) + b"\0" * 4096
    else:
        config = data.draw(altered([config]))
    (place / "adapter_model.safetensors").write_bytes(weights)
    (place / "adapter_config.json").write_text(json.dumps(config))
    with only_our_errors():
        load_adapter(load_vlm(base).model, place)


PICKLED = io.BytesIO()
torch.save({"a.weight": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64)}, PICKLED)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns of other versions of pickle
@fuzz
@given(damaged([PICKLED.getvalue()]))
def test_pickled_checkpoints(tmp_path_factory, data):
    place = tmp_path_factory.getbasetemp() / "pickled"
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text('{"model_type": "llava"}')
    (place / "pytorch_model.bin").write_bytes(data)
    with only_our_errors():
        for tensor in open_checkpoint(place).tensors.values():
            tensor.read()


WEIGHTS = save({"a.weight": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.int64)})
INDEX = {"metadata": {"total_size": 1}, "weight_map": {"a.weight": "model.safetensors"}}


@fuzz
@given(damaged([WEIGHTS]) | st.just(WEIGHTS), st.none() | altered([INDEX]))
def test_checkpoints(tmp_path_factory, data, index):
    place = tmp_path_factory.getbasetemp() / "checkpoint"
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text('{"model_type": "llava"}')
    (place / "model.safetensors").write_bytes(data)
    (place / "model.safetensors.index.json").unlink(missing_ok=True)
    if index is not None:
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
    with only_our_errors():
        for tensor in open_checkpoint(place).tensors.values():
            tensor.read()


def _message(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content


PIECES = b"".join(
    _message(1, _message(1, text.encode()) + b"\x15" + struct.pack("<f", -score) + b"\x18" + bytes([kind]))
    for score, (text, kind) in enumerate([("<unk>", 2), ("<s>", 3), ("a", 1), ("b", 1), ("ab", 1), ("<x>", 4)])
) + _message(2, b"\x18\x02")


@fuzz
@given(damaged([PIECES]))
def test_sentencepiece(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "tokenizer.model"
    path.write_bytes(data)
    with only_our_errors():
        read_sentencepiece(path).encode("ab <x> a")
