"""CLIP-style models of transformers as rankers: CLIP, SigLIP, SigLIP 2, MedSigLIP. Knows no segments."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipImageProcessorPil,
    SiglipModel,
)

from a3tune.errors import ModelError
from a3tune.labels.rank.embed import embed, square
from a3tune.labels.weights import choose_device, folder_hash, load_model, read_config


class _Family(NamedTuple):
    model: Any
    images: Any
    padded: bool
    """Texts fill the whole context and no mask hides the padding: SigLIP was only trained so."""


_FAMILIES: dict[str, _Family] = {
    "clip": _Family(CLIPModel, CLIPImageProcessorPil, padded=False),
    "siglip": _Family(SiglipModel, SiglipImageProcessorPil, padded=True),
    "siglip2": _Family(Siglip2Model, Siglip2ImageProcessorPil, padded=True),
}
"""`model_type` of a folder's config.json -> its parts. MedSigLIP and SigLIP 2 of fixed resolution say `siglip`."""


class ClipRanker:
    """A CLIP, SigLIP, SigLIP 2 or MedSigLIP in a local folder, as transformers saves it, with safetensors weights.

    Images are padded to a square first. Texts longer than the model's context are cut at its end.

    Args:
        folder: where the model is; nothing is downloaded.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        batch_size: images or texts per forward pass.

    Raises:
        ModelError: the folder holds no such model.
    """

    name: ClassVar[str] = "clip"
    kinds: ClassVar[tuple[str, ...]] = tuple(_FAMILIES)
    """What a folder's config.json may say as `model_type`."""

    def __init__(self, folder: Path, device: str | None = None, batch_size: int = 64):
        kind = read_config(folder).get("model_type")
        if kind not in _FAMILIES:
            raise ModelError(f"{folder}: expected a ranker of type {', '.join(_FAMILIES)}, got model_type {kind!r}")
        family = _FAMILIES[kind]
        self._model = load_model(family.model, folder)
        try:
            self._images = family.images.from_pretrained(folder, local_files_only=True)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: expected the processor and tokenizer of a {kind} model: {error}") from error
        self._padded = family.padded
        self._device = choose_device(device)
        self._model.to(self._device)
        config = self._model.config
        self._width: int = config.projection_dim if kind == "clip" else config.vision_config.hidden_size
        self._batch_size = batch_size
        self._content = folder_hash(folder)
        self._arguments = (folder, device, batch_size)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple]:
        """Travels to another process as its folder."""
        return type(self), self._arguments

    def settings(self) -> Mapping[str, object]:
        return {"name": self.name, "content": self._content}

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        return embed(images, self._image_features, self._width, self._batch_size)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return embed(texts, self._text_features, self._width, self._batch_size)

    def _image_features(self, images: list[Image.Image]) -> torch.Tensor:
        inputs = self._images(images=[square(image) for image in images], return_tensors="pt").to(self._device)
        return self._model.get_image_features(**inputs).pooler_output

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        inputs = self._tokenizer(
            texts,
            return_tensors="pt",
            padding="max_length" if self._padded else True,
            truncation=True,
            max_length=self._model.text_model.embeddings.position_embedding.num_embeddings,
            return_attention_mask=not self._padded,
            return_token_type_ids=False,
        ).to(self._device)
        return self._model.get_text_features(**inputs).pooler_output
