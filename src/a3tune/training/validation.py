"""Validation while a model trains: the losses and scores of a fixed sample of rows that it does not learn.

It leaves no trace in the training: neither in random numbers, nor in heads, averages or modes. Knows samples and
models; which adapter is kept is the business of `best`.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from a3tune.config import EvaluationConfig
from a3tune.data.images import load_image
from a3tune.evaluation.evaluate import evaluate
from a3tune.evaluation.predictions import Map
from a3tune.evaluation.results import Results
from a3tune.machine import processes
from a3tune.metrics.catalogue import describe
from a3tune.training.collate import IGNORED, Collator, learning
from a3tune.training.step import Alignment, Counts
from a3tune.types import Sample
from a3tune.vlm.grids import token_boxes
from a3tune.vlm.heat import overlay
from a3tune.vlm.load import Vlm
from a3tune.vlm.patches import paint

_LONGEST_SIDE = 512
"""Of a picture, in pixels: a tracker keeps one of each evaluation."""
_SUMS = ("tokens", "samples", "labelled", "llm", "align", "inside")
"""Of a batch; those of all batches add up to the means."""


class EveryFewSteps(TrainerCallback):
    """Asks for an evaluation every few optimiser steps, and after the last one."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step % self.steps == 0 or state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control


class Validation:
    """Measures a model that is being trained.

    Args:
        vlm: the model with its adapter.
        samples: what it is measured on.
        collator: makes batches of them, with the regions that are known.
        settings: how answers are made and scored; nothing is asked again with parts hidden, whatever they say.
        batch_size: of the passes that the losses take.
        also: a score that is wanted besides those of the main tables.
    """

    def __init__(
        self,
        vlm: Vlm,
        samples: Sequence[Sample],
        collator: Collator,
        settings: EvaluationConfig,
        *,
        batch_size: int,
        also: str | None = None,
    ) -> None:
        self.vlm = vlm
        self.samples = samples
        self.collator = collator
        self.settings = replace(settings, occlude=False)
        self.batch_size = batch_size
        self.also = also
        self.results: Results | None = None
        """Of the last evaluation."""

    def measure(self, alignment: Alignment) -> dict[str, float]:
        """Losses and scores by name, the same on all processes, which share the work.

        `loss`, `loss_llm`, and with alignment `loss_align`, `labelled` and `attention_inside`, are those of the
        training log, over these samples; heads are chosen by the samples of a pass, or as the training ranks them. The
        scores are those of `evaluate`.
        """
        with _no_trace(self.vlm.model):
            losses = self._losses(alignment.apart())
            self.results = evaluate(self.vlm, self.samples, self.settings)
        scores = {
            name: estimate.mean
            for name, estimate in self.results.metrics.items()
            if (describe(name).main or name == self.also) and np.isfinite(estimate.mean)
        }
        return processes.from_first(losses | scores)

    def pictures(self, most: int = 4) -> list[Image.Image]:
        """Where the model looked in the last evaluation, in the first samples: those with a true region go first."""
        if self.results is None:
            return []
        chosen = sorted(self.samples, key=lambda sample: not sample.regions)[:most]
        return [self._picture(sample, self.results.maps[sample.id]) for sample in chosen]

    def _picture(self, sample: Sample, values: Map) -> Image.Image:
        pixels = np.asarray(load_image(sample.image))
        size = (pixels.shape[0], pixels.shape[1])
        picture = overlay(pixels, paint(values.astype(np.float32), token_boxes(self.vlm, *size), size))
        picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        return picture

    def _losses(self, alignment: Alignment) -> dict[str, float]:
        starts = list(range(0, len(self.samples), self.batch_size))
        mine = [
            (start, self._sums(self.samples[start : start + self.batch_size], alignment))
            for start in starts[processes.index() :: processes.count()]
        ]
        # In the order of the batches: the same sum on any number of processes.
        total = dict(zip(_SUMS, np.sum([sums for _, sums in sorted(processes.gather(mine))], axis=0), strict=True))
        llm = total["llm"] / total["tokens"]
        if not alignment.config.weight or not total["labelled"]:
            return {"loss": llm, "loss_llm": llm}
        align = total["align"] / total["samples"]
        # With lambda as it began: losses of two steps could not be compared otherwise.
        return {
            "loss": llm + alignment.config.weight * align,
            "loss_llm": llm,
            "loss_align": align,
            "labelled": total["labelled"] / total["samples"],
            "attention_inside": total["inside"] / total["labelled"],
        }

    def _sums(self, samples: Sequence[Sample], alignment: Alignment) -> list[float]:
        """`_SUMS` of one batch."""
        batch = self.collator(samples)
        tokens, count = int(batch["labels"].ne(IGNORED).sum()), int(learning(batch).sum())
        losses = alignment.losses(self.vlm.model, batch, Counts(tokens, count))
        sums = [tokens, count, 0.0, float(losses.llm) * tokens, 0.0, 0.0]
        if losses.align is not None and (seen := losses.statistics) is not None:
            sums[2], sums[4], sums[5] = float(seen.labelled), float(losses.align) * count, float(seen.inside)
        return sums


@contextmanager
def _no_trace(model: torch.nn.Module) -> Iterator[None]:
    """Evaluate, and put all random numbers and the mode back as they were."""
    training, python, numpy = model.training, random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        model.train(training)
        random.setstate(python)
        np.random.set_state(numpy)
