"""Asking again with parts of the images hidden: what do the answers rest on? Knows models and images, no file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from a3tune.config import EvaluationConfig
from a3tune.data.images import load_image
from a3tune.decoding import make_decoder, make_strategy
from a3tune.errors import DataError, RunError
from a3tune.evaluation.ahead import Ahead
from a3tune.evaluation.asking import answers, seed_of
from a3tune.evaluation.faithfulness import STEPS, Curves, deletion_curves
from a3tune.evaluation.occlusion import Mask, hidden_parts, occlude
from a3tune.evaluation.predictions import Map
from a3tune.evaluation.regions import RegionFinder
from a3tune.metrics.reliance import Hiding, Occluded
from a3tune.types import Filling, Part, Prediction, Sample
from a3tune.vlm.encode import Example, prepare
from a3tune.vlm.load import Vlm
from a3tune.vlm.look import answer_text
from a3tune.vlm.patches import members, token_weights


@dataclass(frozen=True, eq=False)
class _Seen:
    """A sample, read."""

    sample: Sample
    image: Image.Image
    parts: Mapping[Part, Mask]
    """What is hidden of it; nothing without a region."""
    told: NDArray[np.float32] | None
    """Which image tokens its true region holds, `[N]`, for methods that are told; None if it is not known."""


def whole_image(sample: Sample) -> Image.Image:
    """The image of a sample. Raises DataError, which names the sample."""
    try:
        return load_image(sample.image)
    except DataError as error:
        raise DataError(f"sample {sample.id}: {error}") from error


@dataclass(frozen=True)
class Occluder:
    """Asks the questions of a batch again, and deletes image tokens from their answers."""

    vlm: Vlm
    settings: EvaluationConfig
    finder: RegionFinder
    predictions: Mapping[str, Prediction]
    """The answers to the whole images, by sample id."""
    maps: Mapping[str, Map]
    """See `results.Results.maps`."""

    def hiding(self) -> Hiding:
        """What the outcome depends on besides the answers."""
        chosen = self.settings
        return Hiding(chosen.fillings, chosen.dilation, STEPS, **self.finder.settings())

    def __call__(self, ahead: Sequence[Ahead[Image.Image]]) -> list[Occluded]:
        """One record for each sample, in their order; without answers for a sample without a region.

        Asked as the whole images were: the same samples at once (those without a region as they are), with the same
        settings and random numbers. Raises RunError where that cannot be had any more.
        """
        batch, seen = [one.sample for one in ahead], [self._see(one.sample, one.read()) for one in ahead]
        self._check_random_numbers(batch, seen)
        found: list[dict[Part, dict[Filling, str]]] = [{part: {} for part in one.parts} for one in seen]
        for part in get_args(Part):
            if not any(part in one.parts for one in seen):
                continue
            for filling in self.settings.fillings:
                asked = [self._hide(one, part, filling) for one in seen]
                generated = answers(self.vlm, batch, asked, [one.told for one in seen], self.settings)
                for own, tokens in zip(found, generated.tokens, strict=True):
                    if part in own:
                        own[part][filling] = answer_text(self.vlm, tokens)
        curves = self._curves([one for one in seen if one.parts])
        return [
            Occluded(sample.id, self.predictions[sample.id].prediction, own, *curves.get(sample.id, ()))
            for sample, own in zip(batch, found, strict=True)
        ]

    def _check_random_numbers(self, batch: Sequence[Sample], seen: Sequence[_Seen]) -> None:
        """Answers that are drawn are drawn for a batch at once: other batches would count as another picture."""
        strategy = self.settings.strategy or make_decoder(self.settings.decode, self.settings.decoding).strategy
        if not make_strategy(strategy).do_sample:
            return
        whole = [prepare(self.vlm, [one.image], one.sample.prompt) for one in seen]
        again = answers(self.vlm, batch, whole, [one.told for one in seen], self.settings)
        for sample, tokens in zip(batch, again.tokens, strict=True):
            if answer_text(self.vlm, tokens) != self.predictions[sample.id].prediction:
                raise RunError(
                    f"sample {sample.id}: is answered otherwise than before: the {strategy} strategy draws other "
                    "random numbers in batches of another size, or when rows came on top. Evaluate with --occlude in a "
                    "new output folder"
                )

    def _see(self, sample: Sample, image: Image.Image) -> _Seen:
        region = self.finder.find(image, sample)
        if region is None:
            return _Seen(sample, image, {}, None)
        parts = hidden_parts(image, region, self.settings.dilation)
        if not sample.regions:
            return _Seen(sample, image, parts, None)
        boxes = prepare(self.vlm, [image], sample.prompt).boxes
        return _Seen(sample, image, parts, members(token_weights(region, boxes)))

    def _hide(self, one: _Seen, part: Part, filling: Filling) -> Example:
        """The question with a part of its image hidden; with the whole image where it has no such part."""
        image = one.image
        if part in one.parts:
            image = occlude(image, one.parts[part], filling, seed_of(self.settings.seed, one.sample))
        return prepare(self.vlm, [image], one.sample.prompt)

    def _curves(self, seen: Sequence[_Seen]) -> dict[str, Curves]:
        """Deletion curves by sample id."""
        answered: dict[str, Example] = {}
        for one in seen:
            text = self.predictions[one.sample.id].prediction
            try:
                answered[one.sample.id] = prepare(self.vlm, [one.image], one.sample.prompt, text)
            except DataError:
                # What was said reads as a control token, or fills the context: it cannot be read back, so no curve.
                continue
        if not answered:
            return {}
        maps = [self.maps[name] for name in answered]
        seeds = [seed_of(self.settings.seed, one.sample) for one in seen if one.sample.id in answered]
        curves = deletion_curves(self.vlm, list(answered.values()), maps, seeds)
        return dict(zip(answered, curves, strict=True))
