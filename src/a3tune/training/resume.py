"""Whether a run may go on, and how: with which settings, from whole files, in how many passes. Knows the run folder."""

import logging
from dataclasses import asdict
from pathlib import Path

from a3tune.config import RunConfig
from a3tune.errors import AdapterError, RunError
from a3tune.models import check_adapter
from a3tune.run.folder import RunFolder
from a3tune.training.checkpoint import samples_of_step
from a3tune.training.identity import is_recorded

HARMLESS = {
    "model.device",
    "data.validation",
    "data.test",
    "training.save_steps",
    "training.log_steps",
    "training.workers",
    "training.report_to",
    "labels.workers",
    "labels.backend",
}
"""Settings that a run may go on with when they change: they do not touch what is learnt."""
PLACES = {"model.path", "data.train", "labels.store", "labels.weights", "labels.ranker"}
"""Settings that say where something lies; what lies there is compared itself (`training.identity`)."""
PASSES = ("training.batch_size", "training.accumulation")
"""Settings that may change together: what is learnt depends on their product."""

logger = logging.getLogger(__name__)


def accumulation(config: RunConfig, processes: int, checkpoint: Path) -> int:
    """Forward passes per optimiser step, so that it takes as many samples as before, on `processes` processes.

    Raises RunError when they cannot share them evenly.
    """
    samples, pass_samples = samples_of_step(checkpoint), config.training.batch_size * processes
    if samples % pass_samples:
        raise RunError(
            f"{checkpoint}: an optimiser step of this run takes {samples} samples, which {processes} processes cannot "
            f"share in batches of {config.training.batch_size}. Use a number of processes that divides "
            f"{samples // config.training.batch_size}"
        )
    if samples // pass_samples != config.training.accumulation:
        logger.warning(
            "going on with %d processes: training.accumulation=%d keeps the %d samples of a step",
            processes,
            samples // pass_samples,
            samples,
        )
    return samples // pass_samples


def is_finished(folder: RunFolder) -> bool:
    """Whether the run's adapter is there. Raises RunError where it is no more what was saved."""
    if not folder.adapter.is_dir() or not any(folder.adapter.iterdir()):
        return False
    try:
        check_adapter(folder.adapter)
    except AdapterError as error:
        raise RunError(
            f"{error} Or delete {folder.adapter}: the same command then makes it again from the last checkpoint"
        ) from error
    return True


def refuse_other_settings(folder: RunFolder, config: RunConfig) -> None:
    """An adapter whose steps were made with different settings would be neither's."""
    if not folder.config.is_file():
        raise RunError(
            f"{folder.path}: holds a run without its {folder.config.name}, which says what it was trained with. Put it "
            "back to go on, or choose another output"
        )
    earlier = folder.read_config()
    same_passes = _samples(earlier) == _samples(config)
    harmless = HARMLESS | PLACES if is_recorded(folder) else HARMLESS
    for section in ("model", "data", "labels", "adapter", "alignment", "training"):
        old, new = asdict(getattr(earlier, section)), asdict(getattr(config, section))
        for name in old:
            key = f"{section}.{name}"
            if old[name] != new[name] and key not in harmless and not (key in PASSES and same_passes):
                was, now = ("null" if value is None else value for value in (old[name], new[name]))
                raise RunError(
                    f"{folder.path}: holds a run with other settings: {key} was {was}, now {now}. Choose another "
                    "output, or give the settings of its config.yaml to go on with it."
                )


def _samples(config: RunConfig) -> int:
    """Of a process in an optimiser step."""
    return config.training.batch_size * config.training.accumulation
