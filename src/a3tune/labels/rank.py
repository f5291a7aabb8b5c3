"""Segments and prompts -> cosine similarity, top-K (Eq. 3). Knows CLIP-style models, no VLM.

A visual prompt is how a segment is shown to a ranker: a new one is a function and a line in `VISUAL_PROMPTS`. A new
ranker is a class with the members of `Ranker`.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from transformers import BatchEncoding, CLIPModel, CLIPProcessor

from a3tune.errors import ConfigError, LabelError, ModelError
from a3tune.types import Sample

LONGEST_SIDE = 512
"""Pixels of a visual prompt's longer side at most: rankers look at 224 to 448 pixels, scans can have thousands."""
PUBLISHED_QUERY = "Medical image of {location}. {question}"
_CONTEXT = 0.5
"""Margin of `expand` on each side, as a share of the segment's box."""
_DIMMED = 0.35
"""Brightness that `dim` leaves outside the segment."""

VisualPrompt = Callable[[Image.Image, np.ndarray], Image.Image]
"""(RGB image, mask bool [H, W] of a segment that is not empty) -> RGB image, reduced to `LONGEST_SIDE`."""


def crop(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The segment's box, black outside the segment (as published)."""
    picture, inside = _reduced(*_cut(image, mask, context=0.0))
    return Image.composite(picture, Image.new("RGB", picture.size), inside)


def expand(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The segment's box and half as much again on each side, nothing hidden."""
    return _reduced(*_cut(image, mask, context=_CONTEXT))[0]


def box(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The whole image with the segment's box drawn in red."""
    picture, inside = _reduced(image, mask)
    left, top, right, bottom = inside.getbbox() or (0, 0, 1, 1)
    ImageDraw.Draw(picture).rectangle(
        (left, top, right - 1, bottom - 1), outline=(255, 0, 0), width=max(1, max(picture.size) // 120)
    )
    return picture


def blur(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The whole image, blurred outside the segment."""
    picture, inside = _reduced(image, mask)
    return Image.composite(picture, picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 40)), inside)


def dim(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The whole image, at 35 % of its brightness outside the segment: the segment keeps its place in the body."""
    picture, inside = _reduced(image, mask)
    return Image.composite(picture, picture.point([round(_DIMMED * value) for value in range(256)] * 3), inside)


VISUAL_PROMPTS: dict[str, VisualPrompt] = {"crop": crop, "expand": expand, "box": box, "blur": blur, "dim": dim}
"""Name -> how a segment is shown to the ranker."""


class Ranker(Protocol):
    """Embeds images and texts in one space, where a segment is near to the prompts that mean it."""

    name: ClassVar[str]

    def settings(self) -> Mapping[str, object]:
        """Everything the embeddings depend on, as JSON values: the label store ranks again when it changes."""
        ...

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors float32 [M, E] of RGB images of any sizes; M may be 0."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [P, E] of texts."""
        ...


class ClipRanker:
    """A CLIP in a local folder (config, processor, safetensors weights), as transformers saves one.

    Images are padded to a square in black first, because CLIP's centre crop would cut off the segments at the sides.
    Texts longer than the model's context are cut at its end.

    Args:
        folder: where the model is; nothing is downloaded.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        batch_size: images or texts per forward pass.

    Raises:
        ModelError: the folder holds no such model.
    """

    name: ClassVar[str] = "clip"

    def __init__(self, folder: Path, device: str | None = None, batch_size: int = 64):
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: expected the folder of a CLIP model with a config.json, found none")
        try:
            self._processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: expected a CLIP model with safetensors weights: {error}") from error
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model.to(self._device)  # pyright: ignore[reportArgumentType]
        self._batch_size = batch_size
        self._content = _folder_hash(folder)

    def settings(self) -> Mapping[str, object]:
        return {"name": self.name, "content": self._content}

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        squares = [ImageOps.pad(image, (max(image.size), max(image.size))) for image in images]
        return self._embed(
            squares,
            lambda batch: self._processor.image_processor(images=batch, return_tensors="pt"),
            self._model.get_image_features,
        )

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return self._embed(texts, self._tokenize, self._model.get_text_features)

    def _tokenize(self, texts: list[str]) -> BatchEncoding:
        longest = self._model.text_model.embeddings.position_embedding.num_embeddings
        return self._processor.tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=longest,
            return_token_type_ids=False,
        )

    @torch.inference_mode()
    def _embed(self, items: Sequence, prepare: Callable, features: Callable) -> np.ndarray:
        vectors = [torch.zeros(0, self._model.visual_projection.out_features)]
        for start in range(0, len(items), self._batch_size):
            inputs = prepare(list(items[start : start + self._batch_size])).to(self._device)
            vectors.append(features(**inputs).pooler_output.float().cpu())
        return torch.nn.functional.normalize(torch.cat(vectors), dim=-1).numpy()


def top_k(similarity: np.ndarray, k: int | None = None, threshold: float | None = None) -> np.ndarray:
    """Indices of the segments most similar to the prompt, best first; of equals the earlier one (Eq. 3).

    Eq. 3 keeps what reaches a threshold tau_K. `k` is its published form, where tau_K adapts to each prompt so that K
    segments reach it; `threshold` is a fixed tau. With both, at most k of those above the threshold; with neither, all.
    `similarity` is [M]; the result is int [at most M].
    """
    order = np.argsort(-np.asarray(similarity), kind="stable")
    if threshold is not None:
        order = order[np.asarray(similarity)[order] >= threshold]
    return order[:k]


def format_query(template: str, sample: Sample) -> str:
    """Text to rank by: `{question}` becomes the sample's prompt, any other `{field}` its `meta[field]`.

    Raises:
        LabelError: the sample has no such field.
        ConfigError: the template is malformed.
    """
    try:
        return template.format_map({**sample.meta, "question": sample.prompt})
    except KeyError as error:
        known = ", ".join(["question", *sample.meta])
        raise LabelError(
            f"sample {sample.id}: the query {template!r} needs the meta field {error}, the sample has {known}"
        ) from None
    except (ValueError, IndexError, AttributeError) as error:
        raise ConfigError(f"query {template!r}: expected text with {{question}} and {{fields}}: {error}") from None


def _cut(image: Image.Image, mask: np.ndarray, context: float) -> tuple[Image.Image, np.ndarray]:
    """Image and mask within the mask's box, widened by `context` times its sides as far as the image goes."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    extra_y, extra_x = round(context * (bottom - top)), round(context * (right - left))
    top, bottom = max(0, top - extra_y), min(mask.shape[0], bottom + extra_y)
    left, right = max(0, left - extra_x), min(mask.shape[1], right + extra_x)
    return image.crop((left, top, right, bottom)), mask[top:bottom, left:right]


def _reduced(image: Image.Image, mask: np.ndarray) -> tuple[Image.Image, Image.Image]:
    """A copy of the image and its mask (mode L, 255 inside) with the longer side at `LONGEST_SIDE` at most."""
    scale = min(1, LONGEST_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if size == image.size:
        return image.copy(), Image.fromarray(mask.astype(np.uint8) * 255)
    inside = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
    return image.resize(size, Image.Resampling.BOX), inside


def _folder_hash(folder: Path) -> str:
    """SHA-256 over the model's own files: names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".txt"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
