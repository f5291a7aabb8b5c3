"""Samples in batches -> answers, and where the model looked; what every asking has in common. Knows no score."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from a3tune.attention.align import averaged_map
from a3tune.attention.capture import capture_request, stack
from a3tune.attention.heads import HeadSelector
from a3tune.config import EvaluationConfig
from a3tune.data.images import load_image
from a3tune.decoding import Generated, Strategy, generate
from a3tune.decoding.watching import Watcher
from a3tune.errors import DataError, LabelError, ModelError
from a3tune.masks import region_mask
from a3tune.types import Sample
from a3tune.vlm.encode import TOKEN_MASKS, Example, prepare
from a3tune.vlm.load import Vlm
from a3tune.vlm.look import look, model_inputs
from a3tune.vlm.patches import members, token_weights

logger = logging.getLogger(__name__)


class Named(Protocol):
    """What messages can call by a name."""

    @property
    def id(self) -> str: ...


N = TypeVar("N", bound=Named)
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Read:
    """A sample as a model takes it."""

    image: Image.Image
    example: Example
    region_N: NDArray[np.float32] | None
    """Which image tokens its true regions hold, `[N]`; None if none is known, or the model does not see them."""


def read(vlm: Vlm, sample: Sample) -> Read:
    """Pixels and inputs of a sample. Raises DataError and LabelError, which name the sample."""
    try:
        image = load_image(sample.image)
        example = prepare(vlm, [image], sample.prompt)
        if not sample.regions:
            return Read(image, example, None)
        region = np.logical_or.reduce([region_mask(one, image.height, image.width) for one in sample.regions])
    except (DataError, LabelError) as error:
        raise type(error)(f"sample {sample.id}: {error}") from error
    return Read(image, example, members(token_weights(region, example.boxes)) if region.any() else None)


def batches(vlm: Vlm, samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    """Samples of like length together, longest first: less padding, and too little memory shows at once.

    The order of the samples changes nothing: their batches, and with these their random numbers, stay the same.
    """
    lengths = {sample.id: len(vlm.tokenizer(sample.prompt)["input_ids"]) for sample in samples}
    ordered = sorted(samples, key=lambda sample: (-lengths[sample.id], sample.id))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


def in_memory(ask: Callable[[Sequence[N]], R], batch: Sequence[N]) -> list[R]:
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
    *,
    strategy: Strategy | None = None,
    watcher: Watcher | None = None,
) -> Generated:
    """The answers to `asked`, with their end tokens. The random numbers are those of the batch, whatever its images.

    Args:
        regions: which image tokens the true region of each sample holds, float32 `[N]`; None if it is not known, or
            the model does not see it.
        strategy: in place of that of the settings.
        watcher: see `decoding.generate`.
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
        strategy=strategy or settings.strategy,
        max_new_tokens=settings.max_new_tokens,
        seed=seed_of(settings.seed, batch[0]),
        regions_BN=regions_BN,
        watcher=watcher,
    )


def with_answers(asked: Sequence[Example], generated: Generated) -> list[Example]:
    """The examples with their answers behind them, to be looked at once more."""
    return [
        replace(example, input_ids=torch.cat([example.input_ids, tokens]))
        for example, tokens in zip(asked, generated.tokens, strict=True)
    ]


def attend(
    vlm: Vlm, answered: Sequence[Example], settings: EvaluationConfig
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """Maps `[N]` of one teacher-forced pass: over each sample's own R heads (Eq. 8-9), and over all heads (Eq. 2).

    `settings` say which rows and heads (`EvaluationConfig.over`).
    """
    # Padded on the right: positions then start at 0 without being told, in every family.
    inputs, masks = model_inputs(vlm, answered, "right")
    assert settings.rows is not None and settings.heads is not None  # `over`
    request = capture_request(settings.rows, *(masks[name] for name in TOKEN_MASKS))
    captured = stack(look(vlm.model, inputs, masks, request, logits_to_keep=1).attentions, request)
    selector = HeadSelector(settings.heads)
    selected, everywhere = [], []
    for index, example in enumerate(answered):
        one = slice(index, index + 1)
        map_1LHN = captured.map_BLHN[one, ..., : len(example.boxes)]
        heads_LH = selector.select(captured.ratio_BLH[one], captured.counted_B[one])
        for maps, chosen_LH in ((selected, heads_LH), (everywhere, torch.ones_like(heads_LH))):
            maps.append(averaged_map(map_1LHN, chosen_LH)[0].double().cpu().numpy())
    return selected, everywhere


@contextmanager
def evaluation_mode(vlm: Vlm) -> Iterator[None]:
    """Without dropout and without gradients; the model is as it was when this ends."""
    training = vlm.model.training
    vlm.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        vlm.model.train(training)


def seed_of(seed: int, sample: Sample) -> int:
    """Seed of the random numbers of a sample, or of the batch that it is the first of."""
    return int.from_bytes(sha256(f"{seed} {sample.id}".encode()).digest()[:6])
