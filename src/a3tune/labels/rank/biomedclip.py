"""BiomedCLIP on transformers alone, from the published checkpoint files: no open_clip, no timm, no torchvision.

A ViT-B/16 of timm and a BiomedBERT in open_clip's layout become `ViTModel` and `BertModel`; the two are compared by
`tests/parity/biomedclip.py`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, ViTConfig, ViTModel

from a3tune.errors import ModelError
from a3tune.labels.rank.embed import FolderRanker, square
from a3tune.labels.rank.kinds import BIOMEDCLIP_CONFIG as CONFIG
from a3tune.labels.rank.kinds import BIOMEDCLIP_WEIGHTS
from a3tune.models import check_complete, read_config, read_pickled

_SAFETENSORS, _PICKLED = BIOMEDCLIP_WEIGHTS
_HEAD_WIDTH = 64
"""Of both published towers; the checkpoint does not say it."""
_VISION_EPS, _TEXT_EPS = 1e-6, 1e-12

_IGNORED = re.compile(
    r"logit_scale|logit_bias|text\.transformer\.embeddings\.position_ids|text\.transformer\.pooler\..*"
)
"""What similarities do not need."""
_NAMES = (
    (r"visual\.trunk\.cls_token", "vision.embeddings.cls_token"),
    (r"visual\.trunk\.pos_embed", "vision.embeddings.position_embeddings"),
    (r"visual\.trunk\.patch_embed\.proj", "vision.embeddings.patch_embeddings.projection"),
    (r"visual\.trunk\.blocks\.(\d+)\.norm1", r"vision.layers.\1.layernorm_before"),
    (r"visual\.trunk\.blocks\.(\d+)\.norm2", r"vision.layers.\1.layernorm_after"),
    (r"visual\.trunk\.blocks\.(\d+)\.attn\.([qkv])\.", r"vision.layers.\1.attention.\2_proj."),
    (r"visual\.trunk\.blocks\.(\d+)\.attn\.proj", r"vision.layers.\1.attention.o_proj"),
    (r"visual\.trunk\.blocks\.(\d+)\.mlp", r"vision.layers.\1.mlp"),
    (r"visual\.trunk\.norm", "vision.layernorm"),
    (r"visual\.head\.proj", "vision_projection"),
    (r"text\.transformer", "text"),
    (r"text\.proj", "text_projection"),
)
"""Start of a name in the checkpoint -> its start in `_TwoTowers`; the first that fits counts."""


class _TwoTowers(nn.Module):
    """Both encoders and their projections to the common space, in the shapes of a checkpoint's weights."""

    def __init__(self, weights: Mapping[str, Tensor], image_size: int):
        super().__init__()
        width, _, patch, _ = weights["vision.embeddings.patch_embeddings.projection.weight"].shape
        self.vision = ViTModel(
            ViTConfig(
                hidden_size=width,
                num_hidden_layers=_layers(weights, "vision.layers."),
                num_attention_heads=width // _HEAD_WIDTH,
                intermediate_size=len(weights["vision.layers.0.mlp.fc1.weight"]),
                image_size=image_size,
                patch_size=patch,
                layer_norm_eps=_VISION_EPS,
            ),
            add_pooling_layer=False,
        )
        words, width = weights["text.embeddings.word_embeddings.weight"].shape
        self.text = BertModel(
            BertConfig(
                vocab_size=words,
                hidden_size=width,
                num_hidden_layers=_layers(weights, "text.encoder.layer."),
                num_attention_heads=width // _HEAD_WIDTH,
                intermediate_size=len(weights["text.encoder.layer.0.intermediate.dense.weight"]),
                max_position_embeddings=len(weights["text.embeddings.position_embeddings.weight"]),
                type_vocab_size=len(weights["text.embeddings.token_type_embeddings.weight"]),
                layer_norm_eps=_TEXT_EPS,
            ),
            add_pooling_layer=False,
        )
        self.vision_projection = _linear(weights["vision_projection.weight"])
        self.text_projection = nn.Sequential(
            _linear(weights["text_projection.0.weight"]), nn.GELU(), _linear(weights["text_projection.2.weight"])
        )

    def image_features(self, pixels: Tensor) -> Tensor:
        """[B, E], not normalised, of pixels [B, 3, H, W]."""
        return self.vision_projection(self.vision(pixels).last_hidden_state[:, 0])

    def text_features(self, **tokens: Tensor) -> Tensor:
        """[B, E], not normalised, of `input_ids` and `attention_mask` [B, T]."""
        return self.text_projection(self.text(**tokens).last_hidden_state[:, 0])


class BiomedClipRanker(FolderRanker):
    """BiomedCLIP in a local folder as published: open_clip_config.json, weights (safetensors or .bin), tokenizer files.

    Images are padded to a square and reduced to 224 pixels (bicubic); texts are cut at 256 tokens.

    Raises:
        ModelError: a file is missing, or a weight is missing, unknown or of another shape.
    """

    name: ClassVar[str] = "biomedclip"
    takes_grey: ClassVar[bool] = True

    def __init__(self, folder: Path, device: str | None = None, batch_size: int = 64):
        config = read_config(folder, CONFIG)
        try:
            self._size = int(config["model_cfg"]["vision_cfg"]["image_size"])
            self._context = int(config["model_cfg"]["text_cfg"]["context_length"])
            self._mean, self._std = (np.array(config["preprocess_cfg"][name], np.float32) for name in ("mean", "std"))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder / CONFIG}: expected the settings of BiomedCLIP, lacks {error}") from error
        super().__init__(folder, device, batch_size)
        self._model = _load(folder, self._size).to(self._device)
        self._width = self._model.vision_projection.out_features
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: expected BiomedBERT's tokenizer files: {error}") from error

    def _image_features(self, images: list[Image.Image]) -> Tensor:
        size = (self._size, self._size)
        resized = [square(image).resize(size, Image.Resampling.BICUBIC).convert("RGB") for image in images]
        values = (np.stack([np.asarray(image, np.float32) for image in resized]) / 255 - self._mean) / self._std
        return self._model.image_features(torch.from_numpy(values).permute(0, 3, 1, 2).to(self._device))

    def _text_features(self, texts: list[str]) -> Tensor:
        tokens = self._tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self._context,
            return_token_type_ids=False,
        )
        return self._model.text_features(**tokens.to(self._device))


def _load(folder: Path, image_size: int) -> _TwoTowers:
    weights = _renamed(_read(folder))
    try:
        model = _TwoTowers(weights, image_size)
        keys = model.load_state_dict(weights, strict=False)
    except KeyError as error:
        raise ModelError(f"{folder}: weight {error} is missing; get the complete, original checkpoint") from error
    except (RuntimeError, ValueError) as error:  # shapes that do not fit
        raise ModelError(f"{folder}: expected the weights of BiomedCLIP: {error}") from error
    check_complete(folder, weights, keys.missing_keys, keys.unexpected_keys)
    return model.eval().requires_grad_(False)


def _read(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of the published checkpoint."""
    try:
        if (folder / _SAFETENSORS).is_file():
            return load_file(folder / _SAFETENSORS)
        return read_pickled(folder / _PICKLED)
    except Exception as error:  # both readers raise what they like on damaged files
        raise ModelError(f"{folder}: expected BiomedCLIP's {_SAFETENSORS} or {_PICKLED}: {error}") from error


def _renamed(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's weights in fp32 under the names of `_TwoTowers`; names it does not know stay as they are."""
    weights: dict[str, Tensor] = {}
    for name, value in checkpoint.items():
        if _IGNORED.fullmatch(name):
            continue
        parts = {name: value.float()}
        if ".attn.qkv." in name:
            parts = {name.replace("qkv", key): part for key, part in zip("qkv", value.float().chunk(3), strict=True)}
        weights |= {_rename(part): tensor for part, tensor in parts.items()}
    return weights


def _rename(name: str) -> str:
    for pattern, replacement in _NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name


def _layers(weights: Mapping[str, Tensor], start: str) -> int:
    return len({name[len(start) :].split(".")[0] for name in weights if name.startswith(start)})


def _linear(weight: Tensor) -> nn.Linear:
    return nn.Linear(weight.shape[1], weight.shape[0], bias=False)
