"""Synthetic checkpoints in the layouts of the published medical models, at widths that any test can afford."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from a3tune.data.phantom.questions import TEMPLATES

TEXTS = [text for templates in TEMPLATES.values() for text in templates] + ["[INST] [/INST] Human: Assistant:###\n"]
TOWER = CLIPVisionConfig(
    hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,  # so that attention is far from uniform, and a wrong rotation shows
}
LLAMA = {**SHAPE, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}


class Reference(nn.Module):
    """The original LLaVA's forward pass, written plainly: image features take the place of the sentinel -200."""

    def __init__(self, language: PreTrainedModel, layer: int, linear: bool = False) -> None:
        super().__init__()
        width, hidden = TOWER.hidden_size, language.config.hidden_size
        self.language, self.layer = language, layer
        self.tower = CLIPVisionModel(TOWER)
        self.projector: nn.Module = nn.Linear(width, hidden)
        if not linear:
            self.projector = nn.Sequential(self.projector, nn.GELU(), nn.Linear(hidden, hidden))

    @torch.no_grad()
    def logits(self, ids: list[int], pixels: Tensor) -> Tensor:
        states = self.tower(pixels, output_hidden_states=True).hidden_states[self.layer]
        image = self.projector(states[:, 1:])[0]
        at = ids.index(-200)
        embed = self.language.get_input_embeddings()
        parts = [embed(torch.tensor(ids[:at])), image, embed(torch.tensor(ids[at + 1 :]))]
        return self.language(inputs_embeds=torch.cat(parts)[None]).logits[0]

    def weights(self, dtype: torch.dtype, tower: bool = True) -> dict[str, Tensor]:
        """By their original names; and what they lose in `dtype` is lost here too."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype).float()
        found = dict(self.language.state_dict())
        found |= {f"model.mm_projector.{name}": value for name, value in self.projector.state_dict().items()}
        if tower:
            found |= {f"model.vision_tower.vision_tower.{name}": value for name, value in tower_weights(self).items()}
        return {name: value.to(dtype).contiguous() for name, value in found.items()}


def tower_weights(reference: Reference) -> dict[str, Tensor]:
    return {
        f"vision_model.{name.removeprefix('vision_model.')}": value
        for name, value in reference.tower.state_dict().items()
    }


def llava_med_15(folder: Path, *, shards: int = 2, config: Mapping[str, Any] | None = None) -> Reference:
    """`llava_mistral`, sharded safetensors in bfloat16, with the leftovers that real files have."""
    vocab = write_sentencepiece(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        own = MistralConfig(**SHAPE, vocab_size=vocab, rope_theta=1e6, sliding_window=None)
        reference = Reference(MistralForCausalLM(own).eval(), layer=-2).eval()
    weights = reference.weights(torch.bfloat16)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    weights["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.zeros(1, 17)
    write_safetensors(weights, folder, shards)
    published = {
        "model_type": "llava_mistral",
        "architectures": ["LlavaMistralForCausalLM"],
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "rope_theta": 1e6,
        "sliding_window": None,
        "vocab_size": vocab,
    }
    write_json(folder / "config.json", SHAPE | published | (config or {}))
    return reference


def huatuo(folder: Path) -> Reference:
    """`llava_qwen2`: more rows than tokens, a tower without the inner name, float16, one file."""
    rows = write_qwen_tokenizer(folder) + 9
    with torch.random.fork_rng():
        torch.manual_seed(2)
        own = Qwen2Config(**SHAPE | {"rms_norm_eps": 1e-6}, vocab_size=rows, rope_theta=1e6)
        reference = Reference(Qwen2ForCausalLM(own).eval(), layer=-2).eval()
    write_safetensors(reference.weights(torch.float16), folder, shards=1)
    published = {
        "model_type": "llava_qwen2",
        "mm_vision_tower": "./vit/clip_vit_large_patch14_336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "vocab_size": rows,
    }
    write_json(folder / "config.json", SHAPE | published)
    return reference


def llava_med(folder: Path, base: Path, tower: Path) -> Reference:
    """Delta weights in `pytorch_model-*.bin`, their LLaMA, and a CLIP with a text model that nobody needs."""
    vocab = write_sentencepiece(folder)
    special = {"[PAD]": vocab, "<im_patch>": vocab + 1, "<im_start>": vocab + 2, "<im_end>": vocab + 3}
    write_json(folder / "added_tokens.json", special)
    edit(folder / "tokenizer_config.json", pad_token="[PAD]")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        language = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=vocab + 4)).eval()
        reference = Reference(language, layer=-2, linear=True).eval()
        target = reference.weights(torch.float16, tower=False)
        llama = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=vocab)).half().state_dict()
    delta = {name: value.clone() for name, value in target.items()}
    for name, value in llama.items():
        delta[name][: len(value)] -= value
        target[name] = delta[name].clone()
        target[name][: len(value)] += value  # what float16 makes of it
    language.load_state_dict({name: value for name, value in target.items() if "mm_projector" not in name})
    write_bins(delta, folder)
    published = {
        "model_type": "llava",
        "mm_vision_tower": "openai/clip-vit-large-patch14",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": True,
        "use_mm_proj": True,
        "pad_token_id": -1,
        "vocab_size": vocab + 4,
    }
    write_json(folder / "config.json", LLAMA | published)
    base.mkdir()
    write_bins(dict(llama), base)
    write_json(base / "config.json", LLAMA | {"model_type": "llama", "vocab_size": vocab})
    tower.mkdir()
    save_file(tower_weights(reference) | {"text_model.extra": torch.zeros(2)}, tower / "model.safetensors")
    write_json(tower / "config.json", {"model_type": "clip", "vision_config": TOWER.to_dict()})
    return reference


def write_sentencepiece(folder: Path, texts: list[str] = TEXTS) -> int:
    """`tokenizer.model` and its settings; returns the number of pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learnt = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    # In LLaMA's file merged pieces come first, then single characters: order and score are not the same.
    merged, single = ([text for text, _ in learnt if (len(text) > 1) is more] for more in (True, False))
    pieces += [(text, -float(rank), 1) for rank, text in enumerate(merged + single)]
    (folder / "tokenizer.model").write_bytes(sentencepiece_message(pieces))
    write_json(
        folder / "tokenizer_config.json",
        {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True},
    )
    return len(pieces)


def sentencepiece_message(pieces: list[tuple[str, float, int]], model_type: int = 2) -> bytes:
    """The protobuf message that sentencepiece writes, as far as anybody reads it."""

    def field(number: int, wire: int, content: bytes) -> bytes:
        return varint(number << 3 | wire) + content

    def text(content: bytes) -> bytes:
        return varint(len(content)) + content

    message = b"".join(
        field(
            1,
            2,
            text(field(1, 2, text(piece.encode())) + field(2, 5, struct.pack("<f", score)) + field(3, 0, varint(kind))),
        )
        for piece, score, kind in pieces
    )
    return message + field(2, 2, text(field(3, 0, varint(model_type)))) + field(9, 1, b"\0" * 8)


def varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def write_qwen_tokenizer(folder: Path) -> int:
    """`vocab.json`, `merges.txt` and added tokens, as Qwen2 has them; returns the number of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    trained.model.save(str(folder))
    size = trained.get_vocab_size()
    added = {str(size + i): {"content": text} for i, text in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    settings = {"added_tokens_decoder": added, "bos_token": None, "eos_token": "<|endoftext|>", "unk_token": None}
    write_json(folder / "tokenizer_config.json", settings | {"pad_token": "<|endoftext|>"})
    return size + len(added)


def write_safetensors(weights: dict[str, Tensor], folder: Path, shards: int) -> None:
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    names, weight_map = sorted(weights), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = names[number::shards]
        save_file({name: weights[name] for name in own}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_bins(weights: dict[str, Tensor], folder: Path) -> None:
    names, weight_map = sorted(weights), {}
    for number in range(2):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        own = names[number::2]
        torch.save({name: weights[name] for name in own}, folder / file)
        weight_map |= dict.fromkeys(own, file)
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": weight_map})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def edit(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)
