"""JSON that parses and holds wrong types: read, or refused with one line of ours; never a traceback, never a hang."""

import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from a3tune.config import EvaluationConfig
from a3tune.errors import A3TuneError
from a3tune.evaluation.evaluate import evaluate
from a3tune.evaluation.predictions import PredictionLog
from a3tune.labels.quality import Quality
from a3tune.labels.stored import StoredSettings, read_quality, stored_settings
from a3tune.models import read_adapter
from a3tune.report.logs import curves_from_log, experts_from_log, heads_from_log, read_log
from a3tune.run.folder import RunFolder, read_json
from a3tune.run.stages import Stages
from a3tune.training.checkpoint import samples_of_step, state_of
from a3tune.types import Sample
from a3tune.vlm.load import load_vlm
from fuzzing import altered, fuzz, only_our_errors

WRONG = [7, -1, 0, 10**9, 10**400, 1.5, "7", "x", [], {}, None, True]
FILES = {
    "config.json": [
        ("text_config", "num_attention_heads"),
        ("vision_config", "image_size"),
        ("image_token_index",),
        ("vision_feature_layer",),
    ],
    "generation_config.json": [("eos_token_id",), ("output_hidden_states",)],
    "processor_config.json": [("image_processor", "crop_size"), ("image_processor", "image_std"), ("image_token",)],
    "tokenizer_config.json": [("pad_token",), ("tokenizer_class",), ("model_max_length",)],
    "tokenizer.json": [("model",), ("added_tokens",), ("pre_tokenizer",)],
}
"""Of a model's folder: fields that each wrong value is put into, beside the whole file."""


def put(content: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    return content | {path[0]: put(content[path[0]], path[1:], value)}


@pytest.mark.filterwarnings("ignore")  # transformers warns of what it does not know
@settings(fuzz, max_examples=max(20, fuzz.max_examples // 5), suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_models(vlm_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FILES)))
    field = data.draw(st.sampled_from([(), *FILES[name]]))
    place = tmp_path_factory.getbasetemp() / "wrong_model"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(vlm_folder, place)
    content = put(json.loads((vlm_folder / name).read_text()), field, data.draw(st.sampled_from(WRONG)))
    (place / name).write_text(json.dumps(content))
    image = place / "image.png"
    image.write_bytes(_png())
    with only_our_errors():
        answer = EvaluationConfig(max_new_tokens=1)
        evaluate(load_vlm(place, device="cpu"), [Sample("1", image, "Is it?", "yes", "closed")], answer)


def _png() -> bytes:
    file = BytesIO()
    Image.radial_gradient("L").resize((40, 32)).save(file, "PNG")
    return file.getvalue()


QUALITY = {"all": {"samples": 1, "recall": 1.0, "best_iou": 1.0, "ceiling_recall": 1.0, "ceiling_iou": 1.0}}
QUALITY["all"]["precision"] = 0.5
SETTINGS = {"segments": "a", "ranking": "b", "query": "{question}", "settings": {"proposer": {}}, "given": {}}
STATE = {"global_step": 1, "max_steps": 2, "log_history": [], "epoch": 1.0}
LOG = {"step": 1, "loss_llm": 2.0, "heads_selected": ["01"], "query_use": [0.5, 0.5], "query_entropy": 0.1}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


@fuzz
@given(altered([QUALITY]), altered([SETTINGS]))
def test_label_stores(tmp_path_factory: pytest.TempPathFactory, quality: Any, stored: Any) -> None:
    store = tmp_path_factory.getbasetemp() / "wrong_store"
    for name, text in (("quality/a-4.json", quality), ("settings/a.json", stored)):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_text(json.dumps(text))
    with only_our_errors():
        assert all(isinstance(group, Quality) for group in (read_quality(store, "a", 4) or {}).values())
    with only_our_errors():
        assert all(isinstance(found, StoredSettings) for found in stored_settings(store))


@fuzz
@given(altered([STATE]), altered([{"samples": 4}]), altered([LOG]), altered([LORA]))
def test_trainings(tmp_path_factory: pytest.TempPathFactory, state: Any, step: Any, line: Any, adapter: Any) -> None:
    place = tmp_path_factory.getbasetemp() / "wrong_training"
    place.mkdir(exist_ok=True)
    texts = {"trainer_state.json": state, "step.json": step, "metrics.jsonl": line, "adapter_config.json": adapter}
    for name, text in texts.items():
        (place / name).write_text(json.dumps(text) + "\n")
    found = state_of(place)
    assert not found or (found["global_step"] >= 1 and found["max_steps"] >= 1)
    with only_our_errors():
        assert samples_of_step(place) >= 1
    with only_our_errors():
        lines = read_log(place / "metrics.jsonl")
        for read in (curves_from_log, experts_from_log, heads_from_log):
            read(lines)
    with only_our_errors():
        read_adapter(place)


@fuzz
@given(altered([{"model": "tiny", "heads": 0.5, "decoding": {}}]), altered([{"metrics": {"x": {"mean": 1.0}}}]))
def test_evaluations(tmp_path_factory: pytest.TempPathFactory, identity: Any, results: Any) -> None:
    folder = RunFolder(tmp_path_factory.getbasetemp() / "wrong_run")
    folder.path.mkdir(exist_ok=True)
    folder.identity.write_text(json.dumps(identity))
    folder.results.write_text(json.dumps(results))
    folder.predictions.write_bytes(b"")
    with only_our_errors():
        PredictionLog(folder, {}, {"model": "tiny"})
    with only_our_errors():
        assert isinstance(read_json(folder.results, "make it again"), dict)


@fuzz
@given(altered([{"key": "a", "seconds": 1.0, "done": True}]))
def test_stamps(tmp_path_factory: pytest.TempPathFactory, stamp: Any) -> None:
    place = tmp_path_factory.getbasetemp() / "stamps"
    place.mkdir(exist_ok=True)
    (place / "x.json").write_text(json.dumps(stamp))
    Stages(place, lambda text: None).run("x", {}, [], lambda: None)


def test_an_error_names_file_and_field(vlm_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(vlm_folder, tmp_path / "vlm")
    config = json.loads((vlm_folder / "config.json").read_text())
    wrong = put(config, ("text_config", "num_attention_heads"), 0)
    (tmp_path / "vlm" / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(A3TuneError, match=r"config\.json: num_attention_heads: expected an integer from 1"):
        load_vlm(tmp_path / "vlm", device="cpu")
