"""One question about one image -> the answer and where the model looked. Knows no file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from a3tune.config import EvaluationConfig
from a3tune.decoding import check_decoder, make_decoder
from a3tune.errors import LabelError, shown
from a3tune.evaluation.asking import answers, attend, evaluation_mode, in_memory, read, with_answers
from a3tune.masks import box_of, encode_mask, region_mask
from a3tune.metrics.catalogue import attention_metrics
from a3tune.types import Region, Sample
from a3tune.vlm.encode import Example
from a3tune.vlm.heat import overlay
from a3tune.vlm.load import Vlm
from a3tune.vlm.look import answer_text, token_texts
from a3tune.vlm.patches import members, paint, token_weights

Array = NDArray[np.float64]
RegionLike = Sequence[float] | NDArray[Any] | Region
"""A box (x0, y0, x1, y1) in pixels of the image, a mask `[H, W]` of its size, or a region of a sample."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model said about an image, and where it looked.

    The attention is that of `evaluate`: of the text rows `evaluation.rows`, averaged over the heads that look at the
    image most (Eq. 8-9).
    """

    text: str
    tokens: tuple[str, ...]
    """What each token adds to the text; the one that ends the answer is empty."""
    values: Array = field(repr=False)
    """float64 `[N]`: attention on each image token that has a place in the image."""
    boxes: Array = field(repr=False)
    """float64 `[N, 4]`: where each of these tokens looks, as x0, y0, x1, y1 in pixels of the image."""
    image: Image.Image = field(repr=False)
    """RGB, as the model was shown it."""
    settings: EvaluationConfig = field(repr=False)
    """What the answer was made with, and how its attention is scored."""

    @cached_property
    def map(self) -> NDArray[np.float32]:
        """float32 `[H, W]`: the attention laid on the pixels of the image; 0 where no token looks."""
        return paint(self.values, self.boxes, (self.image.height, self.image.width))

    def picture(self) -> Image.Image:
        """The image under its attention; `.picture().save("where.png")` keeps it."""
        return overlay(np.asarray(self.image), self.map)

    def scores(self, region: RegionLike) -> dict[str, float]:
        """How well the attention finds a region: Coverage, Intensity, attention mass, ... by name.

        Args:
            region: a box (x0, y0, x1, y1) in pixels of the image, or a mask, bool `[H, W]` of the image's size.

        Raises LabelError for a region of another form, or outside the image.
        """
        mask = region_mask(as_region(region, self.image), self.image.height, self.image.width)
        return attention_scores(self.values, members(token_weights(mask, self.boxes)), self.settings)


def ask(vlm: Vlm, sample: Sample, settings: EvaluationConfig) -> Answer:
    """The answer to one sample, as `evaluate` would get it from a batch of this sample alone.

    Raises ConfigError, ModelError, DataError and LabelError as `evaluate`.
    """

    def once(batch: Sequence[Sample]) -> Answer:
        seen = read(vlm, batch[0])
        (answered,) = with_answers([seen.example], answers(vlm, batch, [seen.example], [seen.region_N], settings))
        return looked_at(vlm, [answered], [seen.image], settings)[0]

    decoder = make_decoder(settings.decode, settings.decoding)
    check_decoder(decoder, vlm, regions_known=bool(sample.regions), strategy=settings.strategy)
    with evaluation_mode(vlm):
        return in_memory(once, [sample])[0]


def looked_at(
    vlm: Vlm, answered: Sequence[Example], images: Sequence[Image.Image], settings: EvaluationConfig
) -> list[Answer]:
    """What was answered, with the attention of one more pass over all of them."""
    selected, _ = attend(vlm, answered, settings)
    return [
        _answer(vlm, example, map_N, image, settings)
        for example, map_N, image in zip(answered, selected, images, strict=True)
    ]


def attention_scores(map_N: Array, region_N: NDArray[np.float32], settings: EvaluationConfig) -> dict[str, float]:
    """Attention metrics of one map; what is undefined is left out."""
    scores = attention_metrics(map_N[None], region_N[None], tau=settings.tau, normalisation=settings.normalisation)
    return {name: float(values[0]) for name, values in scores.items() if np.isfinite(values[0])}


def _answer(vlm: Vlm, example: Example, map_N: Array, image: Image.Image, settings: EvaluationConfig) -> Answer:
    tokens = example.input_ids[example.prompt_length :]
    placed_N = ~np.isnan(example.boxes[:, 0])
    return Answer(
        text=answer_text(vlm, tokens),
        tokens=token_texts(vlm.tokenizer, tokens.tolist()),
        values=map_N[placed_N],
        boxes=example.boxes[placed_N],
        image=image,
        settings=settings,
    )


def as_region(region: RegionLike, image: Image.Image) -> Region:
    """A region of an image, however it is said. Raises LabelError for what is none."""
    if isinstance(region, Region):
        return region
    values, size = np.asarray(region), (image.height, image.width)
    if values.shape == size:
        return Region(mask=encode_mask(_inside(values)))
    if values.shape != (4,) or values.dtype.kind not in "iuf":
        raise LabelError(
            f"region: expected four numbers (x0, y0, x1, y1), or a mask of {image.height} x {image.width} (height x "
            f"width), got {shown(region) if values.ndim < 2 else ' x '.join(map(str, values.shape))}"
        )
    try:
        return Region(box=box_of(values))
    except ValueError as error:
        raise LabelError(f"region: {error}; got {shown(region)}") from None


def _inside(mask: NDArray[Any]) -> NDArray[np.bool_]:
    """A mask of bool, or of one other number inside and 0 outside; soft masks and maps of several regions are none."""
    inside = mask != 0
    if mask.dtype != bool and len(found := np.unique(mask[inside])) > 1:
        raise LabelError(
            f"region: expected a mask of one region, 0 outside and one number inside, got {len(found)} numbers besides "
            "0; say which pixels are inside: `mask > 0.5`, `mask == 3`"
        )
    return inside
