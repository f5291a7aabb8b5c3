"""Segments by SAM, SAM-HQ or SAM 2 from a grid of points, on transformers alone. Knows no questions."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image

from a3tune.errors import ModelError
from a3tune.labels.propose.canvas import Canvas
from a3tune.labels.propose.filters import Filters
from a3tune.models import choose_device, folder_hash, load_model, read_config
from a3tune.types import Segment

MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
"""ImageNet's, of values 0..255: what every published SAM was trained with."""
_POINTS_AT_ONCE = 64
_STABILITY_OFFSET = 1.0
"""Logits by which the mask's threshold moves up and down (SAM's published value)."""


class _Family(NamedTuple):
    model: str
    """Name in transformers, which imports it when it is first used."""
    stretched: bool
    """The image fills the square; else it keeps its proportions and is padded."""


_FAMILIES: dict[str, _Family] = {
    "sam": _Family("SamModel", stretched=False),
    "sam_hq": _Family("SamHQModel", stretched=False),
    "sam2": _Family("Sam2Model", stretched=True),
    "sam2_video": _Family("Sam2Model", stretched=True),
}
"""`model_type` of a folder's config.json -> how it is used."""


class SamNetwork:
    """A SAM of any family. The image is encoded once; prompts and masks are cheap after that.

    On an accelerator the encoder runs in half precision. Prompts and the mask decoder stay in fp32, because half
    precision would move the points by pixels.

    Raises:
        ModelError: the folder holds none of the known families, or incomplete weights.
    """

    def __init__(self, folder: Path, device: str | None):
        family = _FAMILIES[check_kind(folder)]
        self.stretched = family.stretched
        self._model = load_model(getattr(transformers, family.model), folder).requires_grad_(False)
        self._device = choose_device(device)
        self._model.to(self._device)
        self.side: int = self._model.config.prompt_encoder_config.image_size

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> dict[str, Any]:
        """Keywords for `masks` from the pixels [1, 3, side, side] of a canvas."""
        half = torch.bfloat16 if self._device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float16
        with torch.autocast(self._device.type, dtype=half, enabled=self._device.type != "cpu"):
            features = self._model.get_image_embeddings(pixels.to(self._device))
        if isinstance(features, tuple):  # SAM-HQ also hands over the features of its first layers
            return {
                "image_embeddings": features[0].float(),
                "intermediate_embeddings": [map.float() for map in features[1]],
            }
        return {
            "image_embeddings": [map.float() for map in features] if isinstance(features, list) else features.float()
        }

    @torch.inference_mode()
    def masks(self, encoded: Mapping[str, Any], *, several: bool, **prompts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mask logits [P, C, h, w] and predicted IoU [P, C] of P prompts; C is 3 if `several`, else 1; on the CPU.

        Prompts are `input_points` [1, P, 1, 2] or `input_boxes` [1, P, 4] in pixels of the canvas.
        """
        prompts = {name: prompt.to(self._device) for name, prompt in prompts.items()}
        outputs = self._model(**encoded, **prompts, multimask_output=several)
        return outputs.pred_masks[0].cpu(), outputs.iou_scores[0].cpu()


def check_kind(folder: Path, kinds: Collection[str] = _FAMILIES.keys()) -> str:
    """The `model_type` of a SAM's folder.

    Raises:
        ModelError: it is none of `kinds`.
    """
    kind = str(read_config(folder).get("model_type"))
    if kind not in kinds:
        raise ModelError(f"{folder}: expected a segmenter of type {', '.join(kinds)}, got model_type {kind!r}")
    return kind


@dataclass(frozen=True, kw_only=True)
class Sam(Filters):
    """A SAM, SAM-HQ or SAM 2 in a local folder, asked what lies at each point of a grid.

    Each point gives three masks (part, object, whole); all that pass the filters stay candidates. Filters and the
    suppression of duplicates run on the decoder's coarse grid; only what is kept is enlarged. The thresholds are those
    of A3Tune's published code, which asks at 8 x 8 points and again in four crops; SAM's own grid of 32 x 32 finds the
    same small things while the encoder runs once.

    Raises:
        ConfigError: a setting is of another type or outside its range.
        ModelError: the folder holds no such model.
    """

    name: ClassVar[str] = "sam"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {**Filters.ranges, "points_per_side": (1, 128)}

    weights: Path
    """Folder with config.json and safetensors weights."""
    device: str | None = None
    """cpu, cuda, ...; None takes a GPU if there is one."""
    points_per_side: int = 32
    """Points along each side of the image, 1 to 128 (SAM 32, A3Tune's published code 8)."""
    min_iou: float = 0.5
    """Least IoU that the model predicts for its mask, 0 to 1 (SAM .88, A3Tune's published code .5)."""
    min_stability: float = 0.5
    """Least IoU of the mask at a higher and at a lower threshold, 0 to 1 (SAM .95, A3Tune's published code .5)."""

    def __post_init__(self):
        super().__post_init__()
        check_kind(self.weights)

    def settings(self) -> Mapping[str, object]:
        return {**super().settings(), "weights": self._content}

    def __call__(self, image: Image.Image) -> list[Segment]:
        canvas = Canvas.of(image, self._network.side, stretched=self._network.stretched)
        encoded = self._network.encode(canvas.pixels(image, MEAN, STD))
        candidates = [self._candidates(canvas, encoded, points) for points in self._grid(image)]
        logits, scores = (torch.cat(parts) for parts in zip(*candidates, strict=True))
        keep = self.distinct((canvas.on_image(logits) > 0).numpy(), scores.numpy())
        return [Segment(canvas.mask(logits[index]), min(1.0, float(scores[index]))) for index in keep]

    @cached_property
    def _network(self) -> SamNetwork:
        return SamNetwork(self.weights, self.device)

    @cached_property
    def _content(self) -> str:
        return folder_hash(self.weights)

    def _grid(self, image: Image.Image) -> Iterator[np.ndarray]:
        """The centres of the grid's cells, (x, y) in image pixels, in batches float [<= 64, 2]."""
        centres = (np.arange(self.points_per_side) + 0.5) / self.points_per_side
        points = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2) * image.size
        for start in range(0, len(points), _POINTS_AT_ONCE):
            yield points[start : start + _POINTS_AT_ONCE]

    def _candidates(
        self, canvas: Canvas, encoded: Mapping[str, Any], points: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits float16 [M, h, w] over the canvas and predicted IoU [M] of the masks that pass the filters."""
        logits, scores = self._network.masks(
            encoded, several=True, input_points=canvas.coordinates(points)[None, :, None]
        )
        logits, scores = logits.flatten(0, 1), scores.flatten()
        logits, scores = logits[scores >= self.min_iou], scores[scores >= self.min_iou]
        part = canvas.on_image(logits)
        passes = torch.from_numpy(self.fit((part > 0).numpy())) & (stability(part) >= self.min_stability)
        return logits[passes].half(), scores[passes]


def stability(logits: torch.Tensor) -> torch.Tensor:
    """IoU [M] of the masks of logits [M, h, w] at a higher and at a lower threshold; 0 where both are empty."""
    # NumPy counts a dozen times as fast as torch does.
    higher, lower = ((logits > offset).numpy().sum((1, 2)) for offset in (_STABILITY_OFFSET, -_STABILITY_OFFSET))
    return torch.from_numpy(higher) / torch.from_numpy(lower).clamp(min=1)
