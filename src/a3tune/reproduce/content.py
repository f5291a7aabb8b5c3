"""Whether finished runs were made of the rows, labels and bases that are there now. Loads no model."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from a3tune.config import RunConfig
from a3tune.data.rows import read_rows, read_split
from a3tune.evaluation import identity as evaluation
from a3tune.models import base_hashes
from a3tune.run.folder import RunFolder
from a3tune.training import identity as training
from a3tune.training.regions import known_labels, label_store
from a3tune.training.score import validation_sample


def refuse_other_content(answers: Iterable[tuple[Path, RunConfig]], trained: Iterable[RunConfig]) -> None:
    """Raise RunError naming the first folder that was made of something else, and what that was.

    Args:
        answers: folders of answers, each with the settings of its run.
        trained: settings of runs that have an adapter. Without its label store a run is taken as it is.
    """
    bases = cache(base_hashes)
    tested = cache(lambda path: evaluation.rows_of(read_rows(path)))
    for place, config in answers:
        folder = RunFolder(place)
        if evaluation.is_recorded(folder):
            now = evaluation.EvaluationIdentity(tested(config.data.test), bases(config.model.path))
            evaluation.refuse_other(folder, now)
    started: dict[str, training.TrainingIdentity] = {}
    for config in trained:
        folder, labels = RunFolder(config.output), config.labels
        if not training.is_recorded(folder) or (labels.source == "weak" and not config.label_store.is_dir()):
            continue
        samples, key = read_split(config.data, "train"), repr((config.model.path, config.data, labels, config.training))
        if key not in started:
            store, measured = label_store(config), validation_sample(config)
            known = known_labels(config, store, measured)
            started[key] = training.identity_of(config, samples, store, measured, known)
        training.refuse_other_content(folder, started[key], samples)
