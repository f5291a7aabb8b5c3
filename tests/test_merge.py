"""A merged model answers as base and adapter do, without a3tune; what cannot be merged is refused, nothing is left."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaProcessor, PreTrainedModel
from typer.testing import CliRunner

from a3tune.adapters import add_adapter, load_adapter
from a3tune.cli import app
from a3tune.commands.merge import merge_adapter as merge
from a3tune.config import AdapterConfig
from a3tune.convert.merge import ADAPTER_CARD, MARKER
from a3tune.data.phantom import write_phantom
from a3tune.errors import AdapterError, ModelError, OutputError
from a3tune.machine.digests import DIGESTS
from a3tune.vlm.encode import encode
from a3tune.vlm.load import load_vlm

PROMPTS = ["What organ is this?", "Is there a lesion in the liver?"]
DEPRECATED = "`is_gradient_checkpointing` is deprecated"
"""What PEFT 0.21 asks the model by."""
SERVER = """
import sys, torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, image, out, *prompts = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)
talks = [
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}] for prompt in prompts
]
texts = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
images = [Image.open(image)] * len(texts)
inputs = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[:, -1].contiguous()
    answers = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1]:]
assert "a3tune" not in sys.modules
save_file({"ids": inputs["input_ids"], "logits": logits, "answers": answers.contiguous()}, out)
"""


@pytest.fixture(scope="module")
def adapter(vlm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a short run of plain LoRA with the alignment loss on true regions."""
    folder = tmp_path_factory.mktemp("merge")
    data = write_phantom(folder / "data", {"train": 2, "test": 1}, seed=3)
    settings = ["adapter.kind=lora", "adapter.rank=4", "labels.source=truth", "alignment.heads=0.5", "model.device=cpu"]
    settings += ["training.max_steps=3", "training.learning_rate=0.05", "training.batch_size=2"]
    settings += [f"model.path={vlm_folder}", f"data.train={data['train']}", f"output={folder / 'run'}"]
    result = CliRunner().invoke(app, ["train", *settings])
    assert result.exit_code == 0, result.output
    return folder / "run" / "adapter"


def routed(vlm_folder: Path, folder: Path, experts: int) -> Path:
    vlm = load_vlm(vlm_folder, device="cpu")
    settings = AdapterConfig(rank=2, expert_rank=2, query_experts=experts, key_experts=experts, top_experts=1)
    model = add_adapter(vlm.model, settings)
    model.save_pretrained(str(folder))
    return folder


def test_the_merged_model_answers_as_base_and_adapter(adapter: Path, vlm_folder: Path, tmp_path: Path) -> None:
    merged = merge(adapter, tmp_path / "merged").folder
    picture = tmp_path / "scan.png"
    Image.radial_gradient("L").rotate(20, fillcolor=99).convert("RGB").save(picture)
    served = subprocess.run(
        [sys.executable, "-c", SERVER, merged, picture, tmp_path / "out", *PROMPTS], capture_output=True, text=True
    )
    assert served.returncode == 0, served.stderr
    found = load_file(tmp_path / "out")

    vlm = load_vlm(vlm_folder, device="cpu")
    inputs = {
        name: value
        for name, value in encode(vlm, [Image.open(picture)] * 2, PROMPTS).items()
        if name in ("input_ids", "attention_mask", "pixel_values")
    }
    with torch.no_grad():
        before = vlm.model(**inputs).logits[:, -1]
        model = load_adapter(vlm.model, adapter)
        expected = model(**inputs).logits[:, -1]
        answers = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(found["ids"], inputs["input_ids"])
    assert (expected - before).abs().max() > 0.05
    torch.testing.assert_close(found["logits"], expected, atol=1e-4, rtol=0)
    assert torch.equal(found["answers"], answers)


def test_the_folder_tells_where_it_is_from_but_no_path(adapter: Path, vlm_folder: Path, tmp_path: Path) -> None:
    merged = merge(adapter, tmp_path / "merged").folder
    about = json.loads((merged / MARKER).read_text())
    assert about["base"] == vlm_folder.name and len(about["adapter_sha256"]) == 64
    card = (merged / "README.md").read_text()
    assert "Plain LoRA of rank 4" in card and "aligned to labelled regions" in card and "not a medical device" in card
    assert (merged / ADAPTER_CARD).read_bytes() == (adapter / "README.md").read_bytes()
    for file in merged.iterdir():
        assert str(vlm_folder.parent).encode() not in file.read_bytes(), file.name
        assert str(adapter.parent).encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize("how", ["link", "here", "checkpoint"])
def test_an_adapter_brings_its_base_however_it_is_reached(
    adapter: Path, vlm_folder: Path, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapter.parent, run)
    place = run / "checkpoints" / "checkpoint-3" if how == "checkpoint" else run / "adapter"
    if how == "checkpoint":
        shutil.copytree(run / "adapter", place, dirs_exist_ok=True)
    settings = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    (place / DIGESTS).unlink()
    monkeypatch.chdir(place)
    (tmp_path / "link").symlink_to(place)
    reached = {"link": tmp_path / "link", "here": Path(), "checkpoint": place}[how]
    merged = merge(reached, tmp_path / "merged").folder
    assert json.loads((merged / MARKER).read_text())["base"] == vlm_folder.name
    assert "Plain LoRA of rank 4" in (merged / "README.md").read_text()
    # Beside a checkpoint lies PEFT's card, which names folders.
    assert (merged / ADAPTER_CARD).is_file() == (how != "checkpoint")


def test_the_number_format_of_the_base_is_kept(vlm_folder: Path, tmp_path: Path) -> None:
    base = load_vlm(vlm_folder, device="cpu", dtype="bfloat16")
    base.model.save_pretrained(tmp_path / "base")
    base.processor.save_pretrained(tmp_path / "base")
    model = add_adapter(base.model, AdapterConfig("lora", rank=2))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    model.save_pretrained(str(tmp_path / "adapter"))
    merged = merge(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "base")).folder
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", merged))
    assert before.keys() == after.keys() and {value.dtype for value in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "language_model" in name and "_proj" in name}


def plain(vlm_folder: Path, folder: Path, **options: Any) -> PeftModel:
    """An adapter of plain PEFT, saved in `folder`."""
    model = get_peft_model(load_vlm(vlm_folder, device="cpu").model, LoraConfig(r=2, **options))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(folder))
    return model.eval()


@pytest.mark.filterwarnings(f"ignore:{DEPRECATED}")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_a_head_that_is_also_the_embeddings_is_merged_alone(
    vlm_folder: Path, tmp_path: Path, layer: str, option: str
) -> None:
    """Gemma 3, PaliGemma and small Qwen-VL have one matrix for both: what is added to it would change both."""
    vlm = load_vlm(vlm_folder, device="cpu")
    vlm.model.lm_head.weight = vlm.model.get_input_embeddings().weight
    vlm.model.config.tie_word_embeddings = vlm.model.config.text_config.tie_word_embeddings = True
    vlm.model.save_pretrained(tmp_path / "base")
    vlm.processor.save_pretrained(tmp_path / "base")
    assert not any("lm_head" in key for key in load_file(tmp_path / "base" / "model.safetensors"))
    options = {"target_modules": ["q_proj"]} | {option: [layer]}
    adapted = plain(tmp_path / "base", tmp_path / "adapter", **options)
    merged = load_vlm(
        merge(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "base")).folder, device="cpu"
    )
    ids = torch.arange(20, 28)[None]
    with torch.no_grad():
        difference = (merged.model(input_ids=ids).logits - adapted(input_ids=ids).logits).abs().max()
    assert difference < 1e-4 and not merged.model.config.tie_word_embeddings


@pytest.mark.filterwarnings(f"ignore:{DEPRECATED}")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter .* have invalid shape")
def test_a_bias_for_layers_that_have_none_is_refused(vlm_folder: Path, tmp_path: Path) -> None:
    plain(vlm_folder, tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(AdapterError, match=r"cannot be merged.* has no bias"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=str(vlm_folder))
    assert not (tmp_path / "merged").exists()


def test_settings_of_sampling_that_a_greedy_model_ignores_are_dropped(adapter, vlm_folder, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(vlm_folder, base)
    generation = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(generation | {"temperature": 0.2, "max_length": 77}))
    merged = merge(adapter, tmp_path / "merged", base=str(base)).folder
    kept = json.loads((merged / "generation_config.json").read_text())
    assert "temperature" not in kept and kept["max_length"] == 77


def test_a_routed_adapter_is_refused_before_the_base_is_read(vlm_folder: Path, tmp_path: Path) -> None:
    moe = routed(vlm_folder, tmp_path / "moe", experts=2)
    with pytest.raises(AdapterError, match=r"depends on the prompt and on the image token.*adapter\.kind=lora"):
        merge(moe, tmp_path / "merged", base="/nowhere")
    assert {path.name for path in tmp_path.iterdir()} == {"moe"}


def test_an_adapter_without_experts_is_plain(vlm_folder: Path, tmp_path: Path) -> None:
    plain = routed(vlm_folder, tmp_path / "plain", experts=0)
    assert merge(plain, tmp_path / "merged", base=str(vlm_folder)).nbytes > 0


def test_without_a_base_the_option_is_named(vlm_folder: Path, tmp_path: Path) -> None:
    model = add_adapter(load_vlm(vlm_folder, device="cpu").model, AdapterConfig("lora", rank=2))
    model.save_pretrained(str(tmp_path / "adapter"))
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match=r"names no base model.*--model"):
        merge(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_quantised_weights_are_refused(adapter: Path, vlm_folder: Path, tmp_path: Path) -> None:
    base = load_vlm(vlm_folder, device="cpu", quantization="8bit")
    base.model.save_pretrained(tmp_path / "base")
    base.processor.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"quantised.*--model"):
        merge(adapter, tmp_path / "merged", base=str(tmp_path / "base"))
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_run_on_quantised_weights_says_so(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter.parent, tmp_path / "run")
    settings = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(settings.replace("quantization: null", "quantization: 4bit"))
    merged = merge(tmp_path / "run" / "adapter", tmp_path / "merged").folder
    assert "trained on 4bit weights" in (merged / "README.md").read_text()


def test_weights_that_are_no_numbers_are_refused(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter.parent, tmp_path / "run", ignore=shutil.ignore_patterns(DIGESTS))
    weights = load_file(adapter / "adapter_model.safetensors")
    weights[next(iter(weights))][0] = torch.nan
    save_file(weights, tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="no numbers"):
        merge(tmp_path / "run" / "adapter", tmp_path / "merged")


def test_what_is_there_is_replaced_only_if_it_is_a_merged_model(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    for force in (False, True):
        with pytest.raises(OutputError, match=r"is there already|not a merged model"):
            merge(adapter, tmp_path / "mine", force=force)
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    merged = merge(adapter, tmp_path / "merged").folder
    (merged / "stale").write_text("old")
    with pytest.raises(OutputError, match="is there already"):
        merge(adapter, merged)
    merge(adapter, merged, force=True)
    assert not (merged / "stale").exists() and {path.name for path in tmp_path.iterdir()} == {"mine", "merged"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_merge_that_stops_leaves_nothing(adapter: Path, tmp_path: Path, monkeypatch, error) -> None:
    def stop(self: PreTrainedModel, folder: Path, **settings: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", stop)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        merge(adapter, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_processor_that_cannot_be_read_whole_is_refused(adapter: Path, tmp_path: Path, monkeypatch) -> None:
    class Whole(LlavaProcessor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["tokenizer", "image_processor", "video_processor"]

    monkeypatch.setattr("a3tune.compat.processing.processor_class", lambda config: Whole)
    with pytest.raises(ModelError, match=r"video_processor cannot be read here.*torchvision"):
        merge(adapter, tmp_path / "merged")


def test_the_command(adapter: Path, tmp_path: Path) -> None:
    assert "Example: a3tune merge" in CliRunner().invoke(app, ["merge", "--help"]).output
    result = CliRunner().invoke(app, ["merge", str(adapter), "--out", str(tmp_path / "merged")])
    assert result.exit_code == 0 and "MB in" in result.output
    result = CliRunner().invoke(app, ["merge", str(adapter), "--out", str(tmp_path / "merged")])
    assert result.exit_code == 2 and "--force" in result.output


def test_a_card_that_is_a_link_is_not_copied(adapter: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("what only the user may read")
    run = tmp_path / "strange"
    shutil.copytree(adapter.parent, run)
    (run / "adapter" / "README.md").unlink(missing_ok=True)
    (run / "adapter" / "README.md").symlink_to(secret)
    merged = merge(run / "adapter", tmp_path / "merged").folder
    assert not (merged / ADAPTER_CARD).exists()
