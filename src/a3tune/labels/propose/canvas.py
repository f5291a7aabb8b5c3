"""The square that a SAM-like encoder looks at: an image on it, and its coarse mask logits back in image pixels."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

from a3tune.masks import encode_mask
from a3tune.types import Rle


@dataclass(frozen=True, slots=True)
class Canvas:
    """Where an image lies: in the top left corner, the rest is padding."""

    side: int
    """Pixels of the square's side."""
    image: tuple[int, int]
    """Width and height of the original image."""
    used: tuple[int, int]
    """Width and height of the image on the canvas."""

    @classmethod
    def of(cls, image: Image.Image, side: int, *, stretched: bool) -> Self:
        """The canvas of an image that fills it, or that keeps its proportions with its longer side on it."""
        scale = side / max(image.size)
        kept = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return cls(side, image.size, (side, side) if stretched else kept)

    def pixels(self, image: Image.Image, mean: np.ndarray | float, std: np.ndarray | float) -> torch.Tensor:
        """float32 [1, 3, side, side]: the image's values 0..255, less `mean`, over `std`; padding is 0."""
        resized = np.asarray(image.convert("RGB").resize(self.used, Image.Resampling.BILINEAR), dtype=np.float32)
        values = torch.from_numpy((resized - mean) / std).float().permute(2, 0, 1)[None]
        return pad(values, (0, self.side - self.used[0], 0, self.side - self.used[1]))

    def coordinates(self, points: np.ndarray) -> torch.Tensor:
        """Points (x, y) of the image, float [..., 2], as float32 points of the canvas."""
        return torch.from_numpy(points * np.divide(self.used, self.image)).float()

    def on_image(self, logits: torch.Tensor) -> torch.Tensor:
        """The part of [M, h, w], a grid over the whole canvas, that lies on the image."""
        height, width = logits.shape[-2:]
        columns, rows = -(-self.used[0] * width // self.side), -(-self.used[1] * height // self.side)
        return logits[..., :rows, :columns]

    def mask(self, logits: torch.Tensor) -> Rle:
        """The mask in image pixels of logits [h, w] over the whole canvas: inside is what is above 0."""
        whole = interpolate(logits[None, None].float(), (self.side, self.side), mode="bilinear")
        part = whole[..., : self.used[1], : self.used[0]]
        return encode_mask(interpolate(part, self.image[::-1], mode="bilinear")[0, 0].numpy() > 0)
