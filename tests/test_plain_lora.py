"""LoRA adapters made by PEFT alone, and files as earlier releases of PEFT and transformers wrote them: they load as
PEFT loads them, whatever options they were made with."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from a3tune.adapters import load_adapter
from a3tune.errors import AdapterError
from a3tune.models import read_adapter
from a3tune.vlm.tiny import random_vlm

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Of PEFT, where it saves what is adapted of the embeddings as a whole.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape"),  # and the bias of `lora_bias`
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "ranks": {"rank_pattern": {"q_proj": 4, r"^.*layers\.0.*v_proj": 3}, "alpha_pattern": {"q_proj": 16}},
    "modules": {"modules_to_save": ["lm_head", "multi_modal_projector"]},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True, "target_modules": ["linear_1"]},
    "biases": {"bias": "all"},
    "layers": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "layer": {"layers_to_transform": 1},
    "all": {"target_modules": "all-linear", "exclude_modules": r".*vision_tower.*"},
    "expression": {"target_modules": r".*language_model.*\.(q_proj|k_proj)"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "patches": {"target_modules": ["q_proj", "patch_embedding"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


def base() -> nn.Module:
    return random_vlm(hidden=16, layers=2, heads=2, kv_heads=1, vocab=32, image_size=28)


def saved(folder: Path, **options: Any) -> PeftModel:
    """A trained adapter of plain PEFT, and its file."""
    model = get_peft_model(base(), LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **options}))  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    return model


def same(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_plain_lora_can_be_made_with_is_loaded(tmp_path: Path, options: dict[str, Any]):
    model = saved(tmp_path, **options)
    assert same(load_adapter(base(), tmp_path), model)  # type: ignore[arg-type]


FIELDS_2023: dict[str, Any] = {  # PEFT 0.4, as for LLaVA-1.5
    "auto_mapping": None,
    "base_model_name_or_path": "liuhaotian/llava-v1.5-7b",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 2,
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
FIELDS_SINCE: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "peft_version": "0.18.0",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


@pytest.mark.parametrize("more", [{}, FIELDS_SINCE], ids=["2023", "2025"])
def test_files_of_earlier_releases_are_loaded(tmp_path: Path, more: dict[str, Any]):
    """Fewer and more settings, and layers by the names that transformers had for them before 4.52."""
    model = saved(tmp_path, lora_alpha=8)
    (tmp_path / "adapter_config.json").write_text(json.dumps(FIELDS_2023 | more))
    path = tmp_path / "adapter_model.safetensors"
    old = {
        key.replace("model.model.language_model.", "model.language_model.model.").replace(
            "model.model.vision_tower.", "model.vision_tower.vision_model."
        ): value
        for key, value in load_file(path).items()
    }
    assert "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight" in old
    save_file(old, path)
    assert same(load_adapter(base(), tmp_path), model)  # type: ignore[arg-type]


def test_a_load_that_fails_takes_its_modules_out_again(tmp_path: Path):
    saved(tmp_path, modules_to_save=["lm_head"])
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    save_file({key: value for key, value in whole.items() if "lm_head" not in key}, path)
    model = base()
    with pytest.raises(AdapterError, match="expected a whole adapter"):
        load_adapter(model, tmp_path)  # type: ignore[arg-type]
    assert same(model, base())
    save_file(whole, path)
    load_adapter(model, tmp_path)  # type: ignore[arg-type]


def test_the_head_may_lie_beside_and_nothing_else(tmp_path: Path):
    saved(tmp_path, target_modules=["q_proj", "lm_head"])
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    assert "base_model.model.lm_head.base_layer.weight" in whole
    key = "base_model.model.model.language_model.layers.0.self_attn.v_proj.weight"
    save_file({**whole, key: torch.ones(8, 16)}, path)
    with pytest.raises(AdapterError, match=re.escape(key)):
        load_adapter(base(), tmp_path)  # type: ignore[arg-type]
    assert read_adapter(tmp_path)["r"] == 2
