"""`a3tune eval`: answers and their scores, of models with decoding methods."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from a3tune.commands.checks import check_methods
from a3tune.commands.subject import Subject
from a3tune.config import RunConfig, dump_config
from a3tune.data.public import public_data
from a3tune.data.rows import read_split
from a3tune.decoding import check_decoder, make_decoder
from a3tune.errors import ModelError
from a3tune.evaluation.evaluate import evaluate
from a3tune.evaluation.reliance_log import read_reliance
from a3tune.evaluation.results import Results
from a3tune.machine import processes
from a3tune.report.card import Evaluation, update_card
from a3tune.run.folder import RunFolder
from a3tune.types import Sample
from a3tune.vlm.load import Vlm

GREEDY = "greedy"
"""Decoding method that the others are compared with."""
Progress = Callable[[int, int], None]


def evaluate_run(config: RunConfig, adapter: Path | None, progress: Progress) -> Results:
    """Answer and score `config.data.test` with the base model or an adapter; everything ends in `config.output`.

    An adapter's model card takes over the results.
    """
    make_decoder(config.evaluation.decode, config.evaluation.decoding)  # told before the model is read
    subject = Subject(config, adapter)
    return _evaluate(subject, subject.load(), read_split(config.data, "test"), progress)


def by_difference(out: Path, subjects: Mapping[str, Subject], methods: Sequence[str]) -> Callable[[str, str], Path]:
    """Model, method -> a folder in `out`, called `model-method` less the part that is the same for all."""

    def place(title: str, method: str) -> Path:
        return out / "-".join(([title] if len(subjects) > 1 else []) + ([method] if len(methods) > 1 else []))

    return place


def evaluate_all(
    subjects: Mapping[str, Subject], methods: Sequence[str], place: Callable[[str, str], Path], progress: Progress
) -> tuple[list[Path], dict[str, str]]:
    """`evaluate_run` of every model with every decoding method, in the run folders that `place` gives them.

    Returns the folders, those of greedy decoding first, and by folder name why what is left out cannot be had here.

    Raises ConfigError for a method that does not exist, or settings of one (`evaluation.decoding`) for several.
    """
    for subject in subjects.values():
        check_methods(subject.config.evaluation, methods)
    decoders = {name: make_decoder(name) for name in sorted(methods, key=lambda name: name != GREEDY)}
    runs: list[Path] = []
    absent: dict[str, str] = {}
    for title, subject in subjects.items():
        vlm, samples = subject.load(), read_split(subject.config.data, "test")
        regions_known = all(sample.regions for sample in samples)
        for name, decoder in decoders.items():
            run = place(title, name)
            try:
                check_decoder(decoder, vlm, regions_known=regions_known)
            except ModelError as error:
                absent[run.name] = str(error)
                continue
            settings = replace(subject.config.evaluation, decode=name)
            config = replace(subject.config, evaluation=settings, output=run)
            _evaluate(replace(subject, config=config), vlm, samples, progress)
            runs.append(run)
    return runs, absent


def _evaluate(subject: Subject, vlm: Vlm, samples: Sequence[Sample], progress: Progress) -> Results:
    config = replace(subject.config, evaluation=subject.config.active_evaluation)
    if processes.index() == 0:
        RunFolder.create(config.output)
    processes.wait()
    folder = RunFolder(config.output)
    results = evaluate(vlm, samples, config.evaluation, labels=config.labels, out_folder=folder.path, progress=progress)
    if processes.index() == 0:
        folder.write_text(folder.evaluation.name, dump_config(config))
        if not folder.environment.is_file():
            folder.write_environment()
        if subject.adapter:
            name = public_data(samples)
            hiding, _ = read_reliance(folder)
            update_card(subject.adapter, Evaluation(name, len(samples), config, results.metrics, hiding))
    processes.wait()
    return results
