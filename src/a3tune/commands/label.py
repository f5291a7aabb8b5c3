"""`a3tune label`: weak labels of the training data into a store, and how good they are."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from a3tune.config import LabelsConfig, RunConfig
from a3tune.config.settings import LABEL_MAKING
from a3tune.data.images import describe
from a3tune.data.rows import read_split
from a3tune.labels.fetch import pinned
from a3tune.labels.make import make_maker
from a3tune.labels.quality import Quality, label_quality
from a3tune.labels.rank import format_query
from a3tune.labels.rank.known import warn_of
from a3tune.labels.store import LabelRun, LabelStore, label_images
from a3tune.labels.stored import write_quality

GROUPS = ("body", "modality", "organ")
"""Fields of `meta` that label quality is broken down by."""


def label(
    config: RunConfig, progress: Callable[[int, int], None], warn: Callable[[str], None] = lambda line: None
) -> tuple[LabelRun, dict[str, Quality]]:
    """Weak labels of `config.data.train` into the label store; what is there already is not made again.

    `warn` gets a line where the shipped ranker meets images that it does not know, and where no image has a segment.
    Returns what was done, and how well the labels find the true regions where these are known (`label_quality`).
    """
    samples, settings = read_split(config.data, "train"), config.labels
    for sample in samples:
        format_query(settings.query, sample)  # told before models are read
    if warning := warn_of(settings.ranker, (sample.image for sample in samples)):
        warn(warning)
    run = label_images(
        samples,
        make_maker(settings, config.model.device),
        config.label_store,
        given=_given(settings),
        workers=settings.workers,
        backend=settings.backend,
        progress=progress,
    )
    usable = [sample for sample in samples if describe(sample.image) not in run.failures]
    store = LabelStore(config.label_store, run.settings)
    if usable and not any(store.labels(sample, top_k=1) for sample in usable):
        warn(
            f"warning: no segment was found in any image of {config.data.train}: what learns from these labels is not "
            f"aligned to anything; see what {settings.proposer} keeps (labels.proposal)"
        )
    quality = label_quality(usable, lambda sample: store.labels(sample, top_k=None), top_k=settings.top_k, by=GROUPS)
    write_quality(config.label_store, run.settings, settings.top_k, samples, quality)
    return run, quality


def _given(settings: LabelsConfig) -> dict[str, Any]:
    """What a run that reads these labels takes over into its own settings, as JSON values; models of the Hub with their
    commit."""
    tree = asdict(settings)
    tree |= {"ranker": pinned(settings.ranker), "weights": settings.weights and pinned(settings.weights)}
    return {name: tree[name] for name in LABEL_MAKING}
