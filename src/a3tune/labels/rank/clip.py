"""CLIP-style models of transformers as rankers: CLIP, SigLIP, SigLIP 2, MedSigLIP. Knows no segments."""

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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
from a3tune.labels.rank.embed import FolderRanker, square
from a3tune.labels.rank.kinds import CLIP_TYPES
from a3tune.models import load_model, read_config


class _Family(NamedTuple):
    model: Any
    images: Any
    padded: bool
    """Texts fill the whole context and no mask hides the padding: SigLIP was trained only in this way."""


_PARTS = (
    _Family(CLIPModel, CLIPImageProcessorPil, padded=False),
    _Family(SiglipModel, SiglipImageProcessorPil, padded=True),
    _Family(Siglip2Model, Siglip2ImageProcessorPil, padded=True),
)
_FAMILIES = dict(zip(CLIP_TYPES, _PARTS, strict=True))
"""`model_type` of a folder's config.json -> its parts."""


class ClipRanker(FolderRanker):
    """A CLIP, SigLIP, SigLIP 2 or MedSigLIP in a local folder, as transformers saves it, with safetensors weights.

    Images are padded to a square first. Texts longer than the model's context are cut at its end.

    Raises:
        ModelError: the folder holds no such model.
    """

    name: ClassVar[str] = "clip"
    takes_grey: ClassVar[bool] = True

    def __init__(self, folder: Path, device: str | None = None, batch_size: int = 64):
        kind = read_config(folder).get("model_type")
        if kind not in _FAMILIES:
            raise ModelError(f"{folder}: expected a ranker of type {', '.join(_FAMILIES)}, got model_type {kind!r}")
        family = _FAMILIES[kind]
        self._model = load_model(family.model, folder)
        try:
            self._images = family.images.from_pretrained(folder, local_files_only=True)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: expected the processor and tokenizer of a {kind} model: {error}") from error
        self._padded = family.padded
        super().__init__(folder, device, batch_size)
        self._model.to(self._device)
        config = self._model.config
        self._width: int = config.projection_dim if kind == "clip" else config.vision_config.hidden_size

    def _image_features(self, images: list[Image.Image]) -> torch.Tensor:
        squares = [self._resized(square(image)).convert("RGB") for image in images]
        inputs = self._images(images=squares, return_tensors="pt").to(self._device)
        return self._model.get_image_features(**inputs).pooler_output

    def _resized(self, image: Image.Image) -> Image.Image:
        """A square as the processor resizes it, which first copies all pixels from format to format."""
        images = self._images
        size = {name: length for name, length in dict(images.size or {}).items() if length}
        width, height = (size.get(side) or size.get("shortest_edge") for side in ("width", "height"))
        if not images.do_resize or images.resample is None or not width or not height or "longest_edge" in size:
            return image
        return image.resize((width, height), images.resample)

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
