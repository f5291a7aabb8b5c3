"""Loading a model: what comes back, and what is refused with which words."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, MllamaConfig, PaliGemmaConfig, Qwen3Config

from a3tune.errors import ModelError
from a3tune.vlm.encode import encode
from a3tune.vlm.grids import token_boxes
from a3tune.vlm.load import load_boxes, load_vlm
from a3tune.vlm.tiny import random_vlm, tiny_processor, train_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_vlm(hidden=32, layers=2, heads=4, kv_heads=2, image_size=48).save_pretrained(folder)
    tiny_processor(train_tokenizer(["what is this"]), image_size=48).save_pretrained(folder)
    return folder


def copy(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_gives_a_model_ready_to_use(checkpoint: Path) -> None:
    vlm = load_vlm(checkpoint, device="cpu")
    assert (vlm.device.type, vlm.model.dtype, vlm.model.training) == ("cpu", torch.float32, False)
    batch = encode(vlm, [Image.new("RGB", (60, 48))], ["what is this"])
    assert int(batch["image_mask"].sum()) == len(token_boxes(vlm, 48, 60))
    expected = random_vlm(hidden=32, layers=2, heads=4, kv_heads=2, image_size=48)
    assert torch.equal(vlm.model.lm_head.weight, expected.lm_head.weight)


def test_only_the_language_model_captures_attention(checkpoint: Path) -> None:
    from a3tune.attention.capture import ATTENTION

    config = load_vlm(checkpoint, device="cpu").model.config
    assert (config.text_config._attn_implementation, config.vision_config._attn_implementation) == (ATTENTION, "sdpa")
    config = load_vlm(checkpoint, device="cpu", attention=False).model.config
    assert config.text_config._attn_implementation == "sdpa"


def test_dtype_can_be_chosen(checkpoint: Path) -> None:
    assert load_vlm(checkpoint, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_device_that_is_not_there_is_refused(checkpoint: Path) -> None:
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ModelError, match=f"device '{absent}' is not there; this machine has: .*cpu"):
        load_vlm(checkpoint, device=absent)


def test_old_processors_learn_how_many_tokens_an_image_takes(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "old")
    edit(
        folder / "processor_config.json",
        patch_size=None,
        num_additional_image_tokens=0,
        vision_feature_select_strategy=None,
    )
    vlm = load_vlm(folder, device="cpu")
    assert int(encode(vlm, [Image.new("RGB", (60, 48))], ["what"])["image_mask"].sum()) == 16


def test_a_missing_pad_token_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "nopad")
    edit(folder / "tokenizer_config.json", pad_token=None)
    vlm = load_vlm(folder, device="cpu")
    assert vlm.tokenizer.pad_token == "</s>"
    assert vlm.model.generation_config.pad_token_id == vlm.tokenizer.pad_token_id


@pytest.mark.parametrize("left", [{}, {"pad_token": "<pad>"}])
def test_without_an_end_token_no_answer_ends(checkpoint: Path, tmp_path: Path, left: dict[str, str]) -> None:
    folder = copy(checkpoint, tmp_path / "noend")
    (folder / "tokenizer_config.json").write_text(json.dumps(left))
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: eos_token: expected the token that ends an answer"):
        load_vlm(folder, device="cpu")


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ModelError, match="model /nowhere/model: expected 'tiny', or a folder"):
        load_vlm("/nowhere/model")


def test_a_hub_that_cannot_be_reached_is_told_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.monotonic()
    with pytest.raises(
        ModelError, match=r"owner/model: is no folder here.*cannot be reached.*HF_HUB_OFFLINE=1"
    ) as told:
        load_vlm("owner/model", device="cpu")
    assert time.monotonic() - start < 20 and "\n" not in str(told.value)


def test_what_looks_like_a_folder_never_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("models/llava", "llava", "a/b/c", "~/llava"):
        with pytest.raises(ModelError, match="there is no such folder"):
            load_vlm(name, device="cpu")


def test_unsupported_families_are_told_the_supported_ones(tmp_path: Path) -> None:
    Qwen3Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model_type 'qwen3' is not supported; supported: .*, llava, "):
        load_vlm(tmp_path)


def test_a_model_type_that_nobody_knows_is_told_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ModelError, match=r"supported family \(.*llava, .*nonesuch"):
        load_vlm(tmp_path)


def test_boxes_need_no_weights(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "light")
    expected = token_boxes(load_vlm(folder, device="cpu"), 50, 70)
    (folder / "model.safetensors").unlink()
    assert np.array_equal(load_boxes(folder)(50, 70), expected)


def test_a_missing_shard_is_named(checkpoint: Path, tmp_path: Path) -> None:
    vlm = load_vlm(checkpoint, device="cpu")
    vlm.model.save_pretrained(tmp_path, max_shard_size="20KB")
    vlm.processor.save_pretrained(tmp_path)
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=lost.name):
        load_vlm(tmp_path, device="cpu")


def test_mllama_is_refused_with_the_reason(tmp_path: Path) -> None:
    MllamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cross-attention"):
        load_vlm(tmp_path)


def test_a_language_model_that_caps_its_scores_is_refused(tmp_path: Path) -> None:
    PaliGemmaConfig(text_config={"model_type": "gemma2"}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="model_type 'gemma2' cannot be used: its language model caps"):
        load_vlm(tmp_path)


def test_a_vision_tower_without_a_known_grid_is_refused(tmp_path: Path) -> None:
    LlavaConfig(vision_config={"model_type": "pixtral"}).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match="vision tower 'pixtral' is not supported; supported towers: clip_vision_model"
    ):
        load_vlm(tmp_path)


def test_a_truncated_checkpoint_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="complete, original checkpoint"):
        load_vlm(folder, device="cpu")


def test_missing_weights_are_an_error(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "holes")
    weights = load_file(folder / "model.safetensors")
    removed = next(key for key in weights if "q_proj" in key and "language_model" in key)
    save_file(
        {key: value for key, value in weights.items() if key != removed}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"1 weights are not in the checkpoint, for example .*q_proj"):
        load_vlm(folder, device="cpu")


def test_pickled_weights_are_not_read(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_vlm(folder, device="cpu")
