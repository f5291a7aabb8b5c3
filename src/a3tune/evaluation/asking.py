"""Samples in batches -> answers; what every asking has in common. Knows no score and no file."""

import logging
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from a3tune.config import EvaluationConfig
from a3tune.decoding import Generated, generate
from a3tune.errors import ModelError
from a3tune.types import Sample
from a3tune.vlm.encode import Example
from a3tune.vlm.load import Vlm
from a3tune.vlm.look import model_inputs

logger = logging.getLogger(__name__)
R = TypeVar("R")


def batches(vlm: Vlm, samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    """Samples of like length together, longest first: less padding, and too little memory shows at once.

    The order of the samples changes nothing: their batches, and with these their random numbers, stay the same.
    """
    lengths = {sample.id: len(vlm.tokenizer(sample.prompt)["input_ids"]) for sample in samples}
    ordered = sorted(samples, key=lambda sample: (-lengths[sample.id], sample.id))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


def in_memory(ask: Callable[[Sequence[Sample]], R], batch: Sequence[Sample]) -> list[R]:
    """`ask(batch)`; of its halves in their order, as long as the device has too little memory for the whole."""
    try:
        return [ask(batch)]
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise ModelError(
                f"sample {batch[0].id}: the device has too little memory for it alone; a smaller image, "
                "evaluation.max_new_tokens or model.quantization may help"
            ) from error
    logger.warning("too little memory for %d samples at once, going on with halves", len(batch))
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    half = len(batch) // 2
    return [*in_memory(ask, batch[:half]), *in_memory(ask, batch[half:])]


def answers(
    vlm: Vlm,
    batch: Sequence[Sample],
    asked: Sequence[Example],
    regions: Sequence[NDArray[np.float32] | None],
    settings: EvaluationConfig,
) -> Generated:
    """The answers to `asked`, with their end tokens. The random numbers are those of the batch, whatever its images.

    Args:
        regions: which image tokens the true region of each sample holds, float32 `[N]`; None if it is not known, or
            the model does not see it.
    """
    inputs, _ = model_inputs(vlm, asked, "left")
    regions_BN = None
    if any(sample.regions for sample in batch):
        held = [
            torch.zeros(len(example.boxes)) if region is None else torch.from_numpy(region)
            for example, region in zip(asked, regions, strict=True)
        ]
        regions_BN = pad_sequence(held, batch_first=True).to(vlm.device)
    return generate(
        vlm,
        inputs,
        settings.decode,
        settings=settings.decoding,
        strategy=settings.strategy,
        max_new_tokens=settings.max_new_tokens,
        seed=seed_of(settings.seed, batch[0]),
        regions_BN=regions_BN,
    )


def seed_of(seed: int, sample: Sample) -> int:
    """Seed of the random numbers of a sample, or of the batch that it is the first of."""
    return int.from_bytes(sha256(f"{seed} {sample.id}".encode()).digest()[:6])
