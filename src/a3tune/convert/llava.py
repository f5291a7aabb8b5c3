"""What all checkpoints of the original LLaVA code share: their names, vision tower, projector, tokens and processor.

Knows transformers' LLaVA; not which prompt a checkpoint was trained with.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from a3tune.convert.sentencepiece import read_sentencepiece
from a3tune.convert.stream import HEAD, Checkpoint, LazyTensor, open_checkpoint, read_json
from a3tune.errors import ModelError

IMAGE = "<image>"
TOWER = "model.vision_tower."
EMBEDDINGS = "model.language_model.embed_tokens.weight"
KEYS = {
    r"model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)": TOWER + r"\1",
    r"model\.mm_projector\.0\.(.+)": r"model.multi_modal_projector.linear_1.\1",
    r"model\.mm_projector\.2\.(.+)": r"model.multi_modal_projector.linear_2.\1",
    r"model\.mm_projector\.(weight|bias)": r"model.multi_modal_projector.linear_1.\1",
    r"model\.((?:embed_tokens|layers|norm)\..+)": r"model.language_model.\1",
    r"(lm_head\.weight)": r"\1",
}
"""Original name -> name in transformers; the first that fits."""
COMPUTED = re.compile(r".*(\.inv_freq|\.position_ids)|model\.image_newline")
"""Tensors that transformers computes, or that are for tiled images only."""
CLIP_HEAD_WIDTH = 64
"""Of every CLIP that OpenAI published; the one number of a tower that its weights do not show."""
ROW_MULTIPLE = 64


@dataclass(frozen=True)
class Plan:
    """Everything that a converted folder will hold."""

    config: LlavaConfig
    processor: LlavaProcessor
    generation: GenerationConfig
    tensors: list[LazyTensor]


def renamed(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """All tensors by their names in transformers. Raises `ModelError` for one that LLaVA has no place for."""
    by_new_name = {}
    for name, tensor in tensors.items():
        if COMPUTED.fullmatch(name):
            continue
        new = next((match.expand(to) for key, to in KEYS.items() if (match := re.fullmatch(key, name))), None)
        if new is None:
            raise ModelError(
                f"unexpected tensor {name!r}: LLaVA has no place for it. Is this a checkpoint of another kind, "
                "or one with its own adapter?"
            )
        by_new_name[new] = tensor.renamed(new)
    return by_new_name


def text_config(kind: type[PreTrainedConfig], source: Mapping[str, Any], tokenizer: Any, rows: int) -> Any:
    """Configuration of the language model from the original, flat `config.json`; special tokens are the tokenizer's."""
    known = {field.name for field in fields(kind)} - {"architectures", "transformers_version", "dtype"}  # pyright: ignore[reportArgumentType]
    known |= {"rope_theta", "rope_scaling"}
    settings = {name: value for name, value in source.items() if name in known}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return kind.from_dict({**settings, **ids, "vocab_size": rows})


def with_tower(
    tensors: dict[str, LazyTensor], folder: Path | None, name: str
) -> tuple[dict[str, LazyTensor], CLIPVisionConfig]:
    """The tensors with those of the vision tower, and its configuration.

    The tower comes from the checkpoint, or if it has none from `folder`, a CLIP model in transformers' format. Raises
    `ModelError` when there is none, or one in both places.
    """
    tower = {key.removeprefix(TOWER): tensor for key, tensor in tensors.items() if key.startswith(TOWER)}
    if tower and folder is not None:
        raise ModelError(f"{name}: has a vision tower of its own; leave out the folder {folder}.")
    if tower:
        return tensors, _clip_config({key: tensor.shape for key, tensor in tower.items()})
    if folder is None:
        raise ModelError(
            f"{name}: holds no vision tower. Download the CLIP that its config.json names as mm_vision_tower, and give "
            "its folder as the tower."
        )
    clip = open_checkpoint(folder)
    added = {
        (key := TOWER + name.removeprefix("vision_model.")): tensor.renamed(key)
        for name, tensor in clip.tensors.items()
        if name.startswith("vision_model.") and not COMPUTED.fullmatch(name)
    }
    if not added:
        raise ModelError(f"{folder}: expected a CLIP model with tensors named vision_model.*, found none.")
    return tensors | added, CLIPVisionConfig.from_dict(clip.config.get("vision_config") or dict(clip.config))


def with_projector(tensors: dict[str, LazyTensor], source: Mapping[str, Any]) -> tuple[dict[str, LazyTensor], str]:
    """The tensors with both layers of the projector, and the activation between them.

    transformers' projector has two layers; a single linear one is followed by the identity, which changes nothing.
    """
    kind = source.get("mm_projector_type", "linear")
    if kind == "mlp2x_gelu":
        return tensors, "gelu"
    if kind != "linear":
        raise ModelError(f"mm_projector_type: expected 'linear' or 'mlp2x_gelu', got {kind!r}; it cannot be converted.")
    name = "model.multi_modal_projector.linear_1.bias"
    if name not in tensors:
        raise ModelError(f"the checkpoint lacks the projector (model.mm_projector.*), so {name} cannot be made.")
    bias = tensors[name]
    width = bias.shape[0]
    second = "model.multi_modal_projector.linear_2"
    identity = {
        f"{second}.weight": lambda: torch.eye(width, dtype=bias.dtype),
        f"{second}.bias": lambda: torch.zeros(width, dtype=bias.dtype),
    }
    shapes = {f"{second}.weight": (width, width), f"{second}.bias": (width,)}
    return tensors | {key: LazyTensor(key, shapes[key], bias.dtype, read) for key, read in identity.items()}, "linear"


def with_rows(tensors: dict[str, LazyTensor], needed: int) -> tuple[dict[str, LazyTensor], int, list[int]]:
    """The tensors with at least `needed` rows in both vocabulary matrices; how many rows; and which were added.

    Added rows are the mean of the others. They must never be generated, since nobody has trained them.
    """
    have = tensors[EMBEDDINGS].shape[0]
    if needed <= have:
        return tensors, have, []
    rows = -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE
    grown = {key: _grown(tensors[key], rows) for key in (EMBEDDINGS, HEAD) if key in tensors}
    return tensors | grown, rows, list(range(have, rows))


def read_tokenizer(folder: Path, *, image_token: str, more: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint, with the token for images (and `more`) added if it does not have them.

    Reads `tokenizer.json`, or `tokenizer.model` (LLaMA, Mistral), or `vocab.json` and `merges.txt` (Qwen2). Padding
    takes the unknown or the end token where the checkpoint has none of its own. Raises `ModelError` when there is no
    such file.
    """
    settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "tokenizer.model").is_file():
        backend = read_sentencepiece(folder / "tokenizer.model")
    elif (folder / "vocab.json").is_file():
        backend = Qwen2Tokenizer.from_pretrained(folder).backend_tokenizer
    else:
        raise ModelError(
            f"{folder}: expected tokenizer.json, tokenizer.model or vocab.json; download the tokenizer too."
        )
    _add_tokens(backend, folder, settings, [image_token, *more])
    names = {name: _text(settings.get(f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
    if names["eos"] is None:
        raise ModelError(f"{folder}: tokenizer_config.json names no eos_token, so answers could not end.")
    names["pad"] = names["pad"] or names["unk"] or names["eos"]
    if backend.post_processor is None and names["bos"] and settings.get("add_bos_token", True):
        begin = (names["bos"], backend.token_to_id(names["bos"]))
        backend.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens={"image_token": image_token},
        padding_side="left",
        **{f"{name}_token": text for name, text in names.items() if text is not None},
    )


def make_plan(
    source: Checkpoint,
    tensors: dict[str, LazyTensor],
    *,
    language: type[PreTrainedConfig],
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
    tower: Path | None,
    pads_to_square: bool,
    vision_layer: int,
    stop_strings: list[str] | None = None,
) -> Plan:
    """The plan for tensors that already have transformers' names. `vision_layer` is taken where the config has none."""
    tensors, vision = with_tower(tensors, tower, str(source.folder))
    tensors, activation = with_projector(tensors, source.config)
    for key in (EMBEDDINGS, *(() if source.config.get("tie_word_embeddings") else (HEAD,))):
        if key not in tensors:
            raise ModelError(f"{source.folder}: the weights lack {key}; the checkpoint is not whole.")
    tensors, rows, untrained = with_rows(tensors, len(tokenizer))
    text = text_config(language, source.config, tokenizer, rows)
    size, patch = int(vision.image_size), int(vision.patch_size)  # pyright: ignore[reportArgumentType]
    whole = source.config.get("mm_vision_select_feature", "patch") != "patch"
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.encode(str(tokenizer.image_token), add_special_tokens=False)[0],
        image_seq_length=(size // patch) ** 2 + whole,
        projector_hidden_act=activation,
        vision_feature_layer=source.config.get("mm_vision_select_layer", vision_layer),
        vision_feature_select_strategy="full" if whole else "default",
        tie_word_embeddings=text.tie_word_embeddings,
        dtype=tensors[EMBEDDINGS].dtype,
    )
    ids = {f"{name}_token_id": getattr(text, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    generation = GenerationConfig(**ids, suppress_tokens=untrained or None, stop_strings=stop_strings)
    processor = LlavaProcessor(
        image_processor=_image_processor(size, pads_to_square),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    return Plan(config, processor, generation, list(tensors.values()))


def _image_processor(size: int, pads_to_square: bool) -> LlavaImageProcessorPil:
    """CLIP's resize and crop; with padding, first a square in the mean colour, so that nothing is cropped away."""
    return LlavaImageProcessorPil(
        do_pad=pads_to_square, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


def _clip_config(shapes: Mapping[str, tuple[int, ...]]) -> CLIPVisionConfig:
    """What the shapes of a tower's weights say; the original configuration only names the tower."""
    try:
        width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        positions = shapes["embeddings.position_embedding.weight"][0]
        inner = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as error:
        raise ModelError(f"the vision tower in the checkpoint lacks {error.args[0]}; expected a whole CLIP.") from error
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.layers.")),
        num_attention_heads=width // CLIP_HEAD_WIDTH,
        image_size=isqrt(positions - 1) * patch,
        patch_size=patch,
    )


def _grown(tensor: LazyTensor, rows: int) -> LazyTensor:
    def read() -> torch.Tensor:
        values = tensor.read()
        mean = values.mean(0, keepdim=True, dtype=torch.float32).to(values.dtype)
        return torch.cat([values, mean.expand(rows - len(values), -1)])

    return LazyTensor(tensor.name, (rows, *tensor.shape[1:]), tensor.dtype, read)


def _add_tokens(backend: Tokenizer, folder: Path, settings: Mapping[str, Any], ours: list[str]) -> None:
    """Add the checkpoint's own tokens under the ids they were trained with, then ours at the end."""
    added = {int(index): entry for index, entry in settings.get("added_tokens_decoder", {}).items()}
    added |= {index: {"content": text} for text, index in read_json(folder / "added_tokens.json").items()}
    for index, entry in sorted(added.items()):
        text = entry["content"]
        if entry.get("special", True):
            backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        else:
            backend.add_tokens([AddedToken(text, normalized=entry.get("normalized", False))])
        if backend.token_to_id(text) != index:
            raise ModelError(
                f"{folder}: the token {text!r} should have id {index}, but the vocabulary gives it "
                f"{backend.token_to_id(text)}. Files of different models are mixed in this folder."
            )
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ours])


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token
