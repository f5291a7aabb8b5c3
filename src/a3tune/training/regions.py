"""Where the samples of a training look: what its settings of labels mean to the collator. Knows stores, no model."""

from collections.abc import Container, Sequence
from contextlib import suppress

from a3tune.config import RunConfig
from a3tune.errors import ConfigError, LabelError
from a3tune.labels.fitting import fitting_settings
from a3tune.labels.store import LabelStore
from a3tune.labels.truth import truth_labels
from a3tune.training.collate import RegionSource
from a3tune.types import Sample


def label_store(config: RunConfig) -> LabelStore | None:
    """The weak labels that a training uses, if any. Raises `LabelError` when they were not made yet."""
    if config.labels.source != "weak":
        return None
    return LabelStore(config.label_store, fitting_settings(config.label_store, config.labels, by_name=True).name)


def region_source(config: RunConfig, store: LabelStore | None, among: Container[str] | None = None) -> RegionSource:
    """What `config.labels` means to the collator.

    `among`: ids of the samples that the store has labels of; None: of all, and one without them is an error.
    """
    labels = config.labels
    if store is not None:
        return lambda sample, height, width: (
            store.labels(sample, labels.top_k, labels.threshold) if among is None or sample.id in among else None
        )
    return truth_labels if labels.source == "truth" else lambda sample, height, width: None


def known_labels(config: RunConfig, store: LabelStore | None, samples: Sequence[Sample]) -> dict[str, str]:
    """Sample id -> hash of its labels in the store; samples that were never labelled are missing, which is no error.

    Raises ConfigError where all are missing, and the best adapter is the one that is aligned best to them.
    """
    known: dict[str, str] = {}
    if store is None:
        return known
    for sample in samples:
        with suppress(LabelError):
            known[sample.id] = store.content(sample)
    if config.training.keep_best == "loss_align" and samples and not known:
        raise ConfigError(
            f"training.keep_best: loss_align cannot be measured: no row of data.validation has labels in "
            f"{config.label_store}; make them with `a3tune label {config.data.validation} --out {config.label_store}`"
        )
    return known
