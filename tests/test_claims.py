"""Model folders whose files ask for more than they hold: refused at once, before anything is built of them."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from a3tune.adapters import add_adapter, load_adapter
from a3tune.claims import check_claims
from a3tune.config import AdapterConfig
from a3tune.errors import A3TuneError, AdapterError, ModelError
from a3tune.machine.trial import patterns_end, template_ends
from a3tune.models import read_adapter, shipped
from a3tune.vlm.load import load_vlm

SECONDS = 20
"""Most that any refusal may take on a machine that does other work, too."""


@pytest.fixture
def folder(vlm_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vlm_folder, tmp_path / "model"))


def change(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    change(content)
    path.write_text(json.dumps(content))


def refused(folder: Path, match: str) -> None:
    start = time.monotonic()
    with pytest.raises(ModelError, match=match) as told:
        load_vlm(folder, device="cpu")
    assert time.monotonic() - start < SECONDS and len(str(told.value)) < 1000


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text_config", "num_hidden_layers", 10**6),
        ("vision_config", "num_hidden_layers", 10**6),
        ("text_config", "num_local_experts", 10**6),
        ("text_config", "hidden_size", 10**6),
        ("text_config", "intermediate_size", 10**9),
        ("text_config", "vocab_size", 10**9),
        ("vision_config", "image_size", 10**7),
        ("vision_config", "hidden_size", 10**5),
    ],
)
def test_a_configuration_that_asks_for_more_than_there_is(folder: Path, part: str, field: str, value: int):
    change(folder / "config.json", lambda config: config[part].update({field: value}))
    refused(folder, rf"{part}: .*(expected at most|at least [\d,]+ parameters)")


def test_a_processor_that_asks_for_huge_images(folder: Path):
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            whole = (folder / name).read_text()
            parts = json.loads(whole)
            parts.get("image_processor", parts).update(size={"height": 10**6, "width": 10**6})
            (folder / name).write_text(json.dumps(parts))
            refused(folder, "size: height: expected at most")
            (folder / name).write_text(whole)


def test_a_tokenizer_that_doubles_every_text(folder: Path):
    rules = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40
    change(
        folder / "tokenizer.json",
        lambda tokenizer: tokenizer.update(normalizer={"type": "Sequence", "normalizers": rules}),
    )
    refused(folder, "times as long")


def test_a_tokenizer_with_many_rules_that_do_not_meet(folder: Path):
    """Nine of them lengthen a text by three at most, not by their product."""
    rules = [{"type": "Replace", "pattern": {"String": old}, "content": old + "xy"} for old in "abcdefghi"]
    change(
        folder / "tokenizer.json",
        lambda tokenizer: tokenizer.update(normalizer={"type": "Sequence", "normalizers": rules}),
    )
    check_claims(folder)


def test_a_tokenizer_larger_than_any(folder: Path):
    with (folder / "tokenizer.json").open("ab") as file:
        file.truncate(200 * 2**20)
    refused(folder, "tokenizer.json: expected at most")


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% generation %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endgeneration %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "{{ 'a' * 10000000000 }}",
]


@pytest.mark.parametrize("template", ENDLESS[:1] + ENDLESS[3:])
def test_a_chat_template_that_does_not_end(folder: Path, template: str):
    (folder / "chat_template.jinja").write_text(template)
    refused(folder, "chat template does not end")


def test_templates_that_end():
    assert template_ends("{% for m in messages %}{{ m.role }}{% endfor %}{% generation %}{{ 1 }}{% endgeneration %}")
    assert template_ends("{% for m in messages %}{{ m.content + '' }}{% endfor %}")  # of models that take text alone
    assert not template_ends(ENDLESS[1]) and not template_ends(ENDLESS[2])


def test_whole_models_are_taken(folder: Path):
    for model in (folder, shipped("vlm"), shipped("ranker")):
        check_claims(model)
    # The layout and the numbers of published ones, over weights of their size.
    about = {
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14},
    }
    (folder / "config.json").write_text(json.dumps(about))
    edges = {"shortest_edge": 3136, "longest_edge": 12845056}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": edges, "merge_size": 2, "max_pixels": 12845056})
    )
    with (folder / "model.safetensors").open("ab") as file:
        file.truncate(4 * 10**9)  # in four bits
    check_claims(folder)


# Adapters


@pytest.fixture(scope="module")
def lora(vlm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    add_adapter(load_vlm(vlm_folder, device="cpu").model, AdapterConfig("lora", rank=2)).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("megatron_config", {"hidden_size": 1}),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"cache_file": "/etc/passwd"}),
        ("loftq_config", {"loftq_bits": 4}),
        ("layer_replication", [[0, 10**6]]),
        ("trainable_token_indices", list(range(9))),
        ("target_parameters", ["x"]),
        ("a_setting_of_tomorrow", "on"),
        ("init_lora_weights", "pissa"),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("peft_type", "XLORA"),
        ("peft_type", "PROMPT_TUNING"),
    ],
)
def test_other_ways_to_adapt_are_refused(lora: Path, tmp_path: Path, field: str, value: object):
    adapter = Path(shutil.copytree(lora, tmp_path / "adapter"))
    change(adapter / "adapter_config.json", lambda settings: settings.update({field: value}))
    with pytest.raises(AdapterError, match="Use PEFT to load it"):
        read_adapter(adapter)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_an_expression_that_does_not_end_is_refused(lora: Path, vlm_folder: Path, tmp_path: Path, field: str):
    adapter = Path(shutil.copytree(lora, tmp_path / "adapter"))
    pattern = r"((\w|\.|_)+)+\$"
    value = {pattern: 2} if field == "rank_pattern" else pattern
    change(adapter / "adapter_config.json", lambda settings: settings.update({field: value}))
    start = time.monotonic()
    with pytest.raises(AdapterError, match="runs on without end"):
        load_adapter(load_vlm(vlm_folder, device="cpu").model, adapter)
    assert time.monotonic() - start < SECONDS


def test_a_plain_expression_is_taken(lora: Path, vlm_folder: Path, tmp_path: Path):
    adapter = Path(shutil.copytree(lora, tmp_path / "adapter"))
    pattern = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    change(adapter / "adapter_config.json", lambda settings: settings.update(target_modules=pattern))
    load_adapter(load_vlm(vlm_folder, device="cpu").model, adapter)
    assert not patterns_end(["("], ["a"])


def test_weights_of_an_adapter_that_claim_more_than_they_hold(lora: Path, vlm_folder: Path, tmp_path: Path):
    adapter = Path(shutil.copytree(lora, tmp_path / "adapter"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors, adapter / "adapter_model.safetensors")
    data = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(data.replace(b"[2,", b"[9,"))
    with pytest.raises(A3TuneError):
        load_adapter(load_vlm(vlm_folder, device="cpu").model, adapter)
