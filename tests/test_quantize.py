"""4-bit and 8-bit base models: what is quantised, and that both losses still reach every expert (QLoRA)."""

import importlib.util
import io
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, TrainingArguments

from a3tune.adapters import add_adapter, load_adapter
from a3tune.attention.capture import capture_request, check_captured, stack
from a3tune.config import AdapterConfig, AlignmentConfig
from a3tune.errors import ModelError
from a3tune.labels.truth import truth_labels
from a3tune.training.collate import Collator
from a3tune.training.trainer import A3Trainer
from a3tune.types import Region, Sample
from a3tune.vlm import quantize
from a3tune.vlm.encode import TOKEN_MASKS, encode
from a3tune.vlm.load import Vlm, load_vlm
from a3tune.vlm.quantize import is_quantized, prepare_for_training
from a3tune.vlm.tiny import tiny_config

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
# 8-bit products are made in half precision, and bitsandbytes says so each time.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]
WIDTH = 64  # bitsandbytes packs blocks of 64 weights of a row
SMALL = {"rank": 4, "expert_rank": 2, "query_experts": 3, "key_experts": 3, "top_experts": 3, "router_hidden": 4}


@pytest.fixture(scope="module")
def folder(vlm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The VLM of the other tests, wide enough for a block of weights."""
    return _write(tmp_path_factory.mktemp("quantised"), vlm_folder, tied=False)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_language_model_is_quantised_and_nothing_else(folder: Path, bits: str) -> None:
    import bitsandbytes

    kind = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}[bits]
    vlm = load_vlm(folder, device="cpu", quantization=bits)
    quantised = {name for name, module in vlm.model.named_modules() if isinstance(module, kind)}
    expected = {
        name
        for name, module in load_vlm(folder, device="cpu").model.named_modules()
        if isinstance(module, nn.Linear) and "language_model" in name
    }
    assert quantised == expected and len(expected) > 10
    assert is_quantized(vlm.model)


@needs_bitsandbytes
def test_what_packs_weights_anew_can_be_turned_off() -> None:
    """A canary: a bitsandbytes with another name for it would give wrong gradients without a word."""
    import bitsandbytes

    packs = "avx512" in Path(bitsandbytes.nn.modules.__file__).read_text(encoding="utf-8")
    assert hasattr(bitsandbytes.nn.Linear4bit(WIDTH, WIDTH), "support_avx512bf16_for_cpu") == packs


@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "least"), [("4bit", 0.9), ("8bit", 0.999)])
def test_answers_stay_close_to_those_of_full_precision(folder: Path, bits: str, least: float) -> None:
    logits = [_logits(load_vlm(folder, device="cpu", quantization=how)) for how in (None, bits)]
    similarity = torch.cosine_similarity(logits[0].flatten(), logits[1].flatten(), dim=0)
    assert least < similarity < 1


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_losses_reach_every_expert(folder: Path, bits: str, checkpointing: bool) -> None:
    vlm, model = _adapted(folder, bits)
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    loss, align = _losses(vlm, model)
    for part in (loss, align):
        model.zero_grad()
        part.backward(retain_graph=True)
        reached = {
            name.split(".layers.")[1].split(".lora_")[0]
            for name, parameter in model.named_parameters()
            if ".lora_experts." in name and parameter.grad is not None and parameter.grad.abs().max() > 0
        }
        assert reached == {f"{layer}.self_attn.{matrix}" for layer in (0, 1) for matrix in ("q_proj", "k_proj")}
    assert not [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]


@needs_bitsandbytes
def test_gradients_are_the_same_with_checkpointing(folder: Path) -> None:
    found = []
    for checkpointing in (False, True):
        vlm, model = _adapted(folder, "4bit")
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        sum(_losses(vlm, model)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-7) for name in found[0])


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_inference_before_training_does_not_change_it(folder: Path, bits: str) -> None:
    found = []
    for calibrated in (False, True):
        vlm, model = _adapted(folder, bits)
        if calibrated:
            _logits(vlm, model.eval())
            model.train()
        sum(_losses(vlm, model)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@needs_bitsandbytes
def test_reentrant_checkpointing_is_refused(folder: Path) -> None:
    vlm, model = _adapted(folder, "4bit")
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": True})
    model.get_base_model().enable_input_require_grads()
    with pytest.raises(ModelError, match="Reentrant"):
        _losses(vlm, model)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("kind", ["a3moe", "lora"])
def test_adapters_train_save_and_load(folder: Path, tmp_path: Path, bits: str, kind: str) -> None:
    vlm, model = _adapted(folder, bits, kind)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = _losses(vlm, model)[0]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(str(tmp_path))
    again, loaded = _reloaded(folder, tmp_path, bits)
    assert torch.equal(_logits(vlm, model.eval()), _logits(again, loaded))


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_trainer_trains_on_a_quantised_base(folder: Path, tmp_path: Path, bits: str) -> None:
    vlm, model = _adapted(folder, bits)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        use_cpu=True,
        activation_checkpointing=True,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    file = io.BytesIO()
    Image.radial_gradient("L").resize((60, 48)).convert("RGB").save(file, "PNG")
    region = Region(box=(0.0, 0.0, 30.0, 24.0))
    data = [Sample(f"s{i}", file.getvalue(), "What organ?", "liver", "open", (region,)) for i in range(4)]
    alignment = AlignmentConfig(weight=0.5, heads=3, head_selection="fixed")
    trainer = A3Trainer(model, args, data, Collator(vlm, truth_labels), alignment=alignment)
    trainer.calibrate_heads()
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss_align" in line]
    assert len(logged) == 2 and all(line["loss_align"] > 0 for line in logged)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".lora_" in name for name in changed)
    assert {name for name in before if ".lora_experts." in name and "B.weight" in name} <= changed


@needs_bitsandbytes
def test_adapters_generate_on_a_quantised_base(folder: Path) -> None:
    vlm, model = _adapted(folder, "4bit")
    batch = _batch(vlm, answers=False)
    model.eval()
    with torch.no_grad():
        generated = model.generate(**{k: v for k, v in batch.items() if k not in TOKEN_MASKS}, max_new_tokens=3)
    assert generated.shape[1] > batch["input_ids"].shape[1]


@needs_bitsandbytes
def test_tied_embeddings_stay_tied(folder: Path, tmp_path: Path) -> None:
    tied = _write(tmp_path / "vlm", folder, tied=True)
    vlm, model = _adapted(tied, "4bit")
    before = _logits(vlm, model.eval())
    assert _tied(vlm)
    model.save_pretrained(str(tmp_path / "adapter"))
    again, loaded = _reloaded(tied, tmp_path / "adapter", "4bit")
    assert _tied(again)
    assert torch.equal(_logits(again, loaded), before)


@needs_bitsandbytes
def test_normalisation_is_trained_through_in_full_precision(folder: Path) -> None:
    vlm = load_vlm(folder, device="cpu", dtype=torch.bfloat16, quantization="4bit")
    prepare_for_training(vlm.model)
    own = {name: p.dtype for name, p in vlm.model.named_parameters() if "language_model" in name and "norm" in name}
    assert set(own.values()) == {torch.float32} and len(own) == 5
    assert vlm.model.get_input_embeddings().weight.dtype == torch.bfloat16
    model = add_adapter(vlm.model, AdapterConfig(**SMALL))
    with torch.autocast("cpu", torch.bfloat16):
        loss, align = _losses(vlm, model)
    (loss + align).backward()
    grads = [p.grad for name, p in model.named_parameters() if ".lora_experts." in name]
    assert all(torch.isfinite(grad).all() for grad in grads) and any(grad.abs().max() > 0 for grad in grads)


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"Install a3tune\[quantize\]"):
        load_vlm(folder, device="cpu", quantization="4bit")


def test_other_numbers_of_bits_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="expected one of 4bit, 8bit, got '2bit'"):
        load_vlm(folder, device="cpu", quantization="2bit")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_changes_nothing_on_one_device(folder: Path, device_map: str | dict) -> None:
    expected = load_vlm(folder, device="cpu")
    spread = load_vlm(folder, device_map=device_map, dtype=torch.float32)
    assert torch.equal(_logits(expected), _logits(spread))


def test_a_device_and_a_device_map_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="leave out device"):
        load_vlm(folder, device="cpu", device_map="auto")


def _write(out: Path, processor: Path, tied: bool) -> Path:
    config = tiny_config(layers=2, heads=4, kv_heads=2, hidden=WIDTH)
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = tied
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        (out / name).write_bytes((processor / name).read_bytes())
    return out


def _adapted(folder: Path, bits: str, kind: str = "a3moe") -> tuple[Vlm, PeftModel]:
    vlm = load_vlm(folder, device="cpu", quantization=bits)
    prepare_for_training(vlm.model)
    torch.manual_seed(0)
    model = add_adapter(vlm.model, AdapterConfig(kind, **SMALL))
    for name, parameter in model.named_parameters():
        # B starts at zero, where no gradient passes it; an adapter that was trained a little does not.
        if parameter.requires_grad and name.endswith(("B.weight", "lora_B.default.weight")):
            nn.init.normal_(parameter, std=0.05)
    return vlm, model.train()


def _reloaded(folder: Path, adapter: Path, bits: str) -> tuple[Vlm, PeftModel]:
    vlm = load_vlm(folder, device="cpu", quantization=bits)
    prepare_for_training(vlm.model)  # a CPU then computes as it did in training
    return vlm, load_adapter(vlm.model, adapter)


def _batch(vlm: Vlm, answers: bool = True) -> dict[str, Tensor]:
    images = [Image.radial_gradient("L").resize((60, size)).convert("RGB") for size in (40, 60)]
    prompts = ["What organ is this?", "Is it the left lung?"]
    return dict(encode(vlm, images, prompts, ["the liver", "yes"] if answers else None, padding_side="right"))


def _losses(vlm: Vlm, model: PeftModel) -> tuple[Tensor, Tensor]:
    """The language loss and a stand-in for the alignment loss: the attention on half of the image."""
    batch = _batch(vlm)
    masks = {name: batch.pop(name) for name in TOKEN_MASKS}
    request = capture_request("after_image", **masks)
    outputs = model(**batch, capture=request, output_attentions=True, use_cache=False)
    check_captured(outputs.attentions, model)
    maps = stack(outputs.attentions, request).map_BLHN
    return outputs.loss, maps[..., : maps.shape[-1] // 2].sum(-1).square().mean()


@torch.no_grad()
def _logits(vlm: Vlm, model: nn.Module | None = None) -> Tensor:
    batch = {name: value for name, value in _batch(vlm).items() if name not in TOKEN_MASKS}
    return (model or vlm.model)(**batch).logits


def _tied(vlm: Vlm) -> bool:
    return vlm.model.get_output_embeddings().weight is vlm.model.get_input_embeddings().weight
