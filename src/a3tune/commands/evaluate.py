"""`a3tune eval`: answers and their scores, of models with decoding methods."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from a3tune.bases import hub_name
from a3tune.commands.checks import check_methods
from a3tune.commands.subject import Subject
from a3tune.config import RunConfig, dump_config
from a3tune.data.public import public_data
from a3tune.data.rows import read_split
from a3tune.decoding import check_decoder, make_decoder
from a3tune.decoding.base import Decoder
from a3tune.errors import A3TuneError, ConfigError, ModelError
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
    return evaluate_loaded(subject, subject.load(), read_split(config.data, "test"), progress)


def by_difference(out: Path, subjects: Mapping[str, Subject], methods: Sequence[str]) -> Callable[[str, str], Path]:
    """Model, method -> a folder in `out`, called `model-method` less the part that is the same for all."""

    def place(title: str, method: str) -> Path:
        return out / "-".join(([title] if len(subjects) > 1 else []) + ([method] if len(methods) > 1 else []))

    return place


@dataclass(frozen=True, slots=True)
class Evaluations:
    """What became of several evaluations."""

    runs: list[Path]
    """Folders of those that are whole, those of greedy decoding first."""
    absent: dict[str, str]
    """By name of the folder: why what was left out cannot be had here."""
    failed: dict[str, A3TuneError]
    """By name of the folder, or of a model that could not be loaded: what stopped it."""


def evaluate_all(
    subjects: Mapping[str, Subject], methods: Sequence[str], place: Callable[[str, str], Path], progress: Progress
) -> Evaluations:
    """`evaluate_run` of every model with every decoding method, in the run folders that `place` gives them.

    What a model cannot do is told before it answers anything. An evaluation that fails stops no other, except where
    several processes share them, which would wait for each other.

    Raises ConfigError for a method that does not exist, or settings of one (`evaluation.decoding`) for several.
    """
    for subject in subjects.values():
        check_methods(subject.config.evaluation, methods)
    decoders = {name: make_decoder(name) for name in sorted(methods, key=lambda name: name != GREEDY)}
    runs: list[Path] = []
    absent: dict[str, str] = {}
    failed: dict[str, A3TuneError] = {}
    for title, subject in subjects.items():
        with _kept(title, failed):
            vlm, samples = subject.load(), read_split(subject.config.data, "test")
            regions_known = all(sample.regions for sample in samples)
            chosen = {name: place(title, name) for name in decoders}
            for name, decoder in decoders.items():
                if reason := _refusal(decoder, vlm, subject.config.evaluation.strategy, regions_known=regions_known):
                    absent[chosen.pop(name).name] = reason
            for name, run in chosen.items():
                settings = replace(subject.config.evaluation, decode=name)
                config = replace(subject.config, evaluation=settings, output=run)
                with _kept(run.name, failed):
                    evaluate_loaded(replace(subject, config=config), vlm, samples, progress)
                    runs.append(run)
    return Evaluations(runs, absent, failed)


def _refusal(decoder: Decoder, vlm: Vlm, strategy: str | None, *, regions_known: bool) -> str:
    """Why a method cannot answer; empty if it can."""
    try:
        check_decoder(decoder, vlm, regions_known=regions_known, strategy=strategy)
    except (ConfigError, ModelError) as error:
        return str(error)
    return ""


@contextmanager
def _kept(name: str, failed: dict[str, A3TuneError]) -> Iterator[None]:
    """Keep an error for later, so that the rest goes on."""
    try:
        yield
    except A3TuneError as error:
        if processes.count() > 1:
            raise
        failed[name] = error


def evaluate_loaded(subject: Subject, vlm: Vlm, samples: Sequence[Sample], progress: Progress) -> Results:
    """`evaluate_run` of a model that is there already."""
    config = replace(subject.config, evaluation=subject.config.active_evaluation)
    if processes.index() == 0:
        RunFolder.create(config.output)
    processes.wait()
    folder = RunFolder(config.output)
    results = evaluate(vlm, samples, config.evaluation, labels=config.labels, out_folder=folder.path, progress=progress)
    if processes.index() == 0:
        folder.write_text(folder.evaluation.name, dump_config(config))
        if not folder.environment.is_file():
            folder.write_environment(hub_name(config.model.path))
        if subject.adapter:
            name = public_data(samples)
            hiding, _ = read_reliance(folder)
            update_card(subject.adapter, Evaluation(name, len(samples), config, results.metrics, hiding))
    processes.wait()
    return results
