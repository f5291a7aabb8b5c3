"""What rankers share: square pictures, items to unit vectors in batches, a model in a folder. Knows no architecture."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps

from a3tune.models import choose_device, folder_hash


def square(image: Image.Image) -> Image.Image:
    """The image in the middle of a black square: CLIP's centre crop would cut off its sides, a resize distort it."""
    side = max(image.size)
    return image if image.size == (side, side) else ImageOps.pad(image, (side, side))


@torch.inference_mode()
def embed(items: Sequence, features: Callable[[list], torch.Tensor], width: int, batch_size: int) -> np.ndarray:
    """Unit vectors float32 [M, width] of what `features` makes of at most `batch_size` items at a time; M may be 0."""
    vectors = [torch.zeros(0, width)]
    for start in range(0, len(items), batch_size):
        vectors.append(features(list(items[start : start + batch_size])).float().cpu())
    return torch.nn.functional.normalize(torch.cat(vectors), dim=-1).numpy()


class FolderRanker:
    """A `Ranker` whose model lies in a folder; a subclass loads it and makes features, not normalised, of batches.

    Args:
        folder: where the model is; nothing is downloaded.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        batch_size: images or texts per forward pass.
    """

    name: ClassVar[str]
    takes_grey: ClassVar[bool] = False
    """Whether pictures without colours may come as one channel (mode L), which is quicker."""
    _width: int
    """E of the vectors."""

    def __init__(self, folder: Path, device: str | None = None, batch_size: int = 64):
        self._device = choose_device(device)
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
        """[M, E] of RGB images of any sizes."""
        raise NotImplementedError

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        """[P, E] of texts."""
        raise NotImplementedError
