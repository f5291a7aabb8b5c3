"""What can be told of a command's arguments before anything slow is imported: what is not there, or no name of ours.

Every check raises what the work itself would raise, through the function that it would raise it by. Touches nothing but
the cache of the Hugging Face Hub, for a model of it that the user named.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from a3tune.config import RunConfig
from a3tune.config.settings import EvaluationConfig, LabelsConfig
from a3tune.data.images import load_image
from a3tune.data.rows import check_split, read_split
from a3tune.decoding import check_name, make_strategy
from a3tune.errors import ConfigError, LabelError
from a3tune.evaluation.regions import kind_of_regions
from a3tune.labels.fetch import model_folder
from a3tune.labels.propose import check_proposer, check_segmenter
from a3tune.labels.rank import check_ranker, check_visual_prompt, format_query
from a3tune.labels.stored import none_found
from a3tune.machine.files import check_place
from a3tune.metrics.radiology import check_weights
from a3tune.models import check_model, read_adapter
from a3tune.run.folder import MARKER, RunFolder
from a3tune.training.score import validation_sample
from a3tune.training.tracking import check_trackers


def check_label(config: RunConfig) -> None:
    """Rows, what to rank by, and what finds and ranks segments."""
    check_query(config)
    check_store(config.label_store)
    check_label_maker(config.labels)


def check_query(config: RunConfig) -> None:
    """What segments are ranked by, with the first row."""
    format_query(config.labels.query, check_split(config.data, "train"))


def check_store(folder: Path) -> None:
    """Raises LabelError for a place where labels do not belong."""
    check_place(folder, "a folder for the labels", LabelError)
    if (folder / MARKER).is_file():
        raise LabelError(f"{folder}: is the folder of a run; keep labels in a folder of their own")


def check_label_maker(labels: LabelsConfig) -> None:
    """What finds and ranks segments. A model of the Hugging Face Hub is downloaded here, before other bars open."""
    check_visual_prompt(labels.visual_prompt)
    check_proposer(labels.proposer, labels.weights)
    if labels.weights:
        check_segmenter(labels.proposer, model_folder(labels.weights))
    check_ranker(model_folder(labels.ranker))


def check_demo(configs: Iterable[RunConfig], folder: Path) -> None:
    """All that the demo does not make itself."""
    for config in configs:
        check_label_maker(config.labels)
        check_models(config, [])
        check_methods(config.evaluation, [config.evaluation.decode])
    RunFolder.check(folder)


def check_train(config: RunConfig) -> None:
    """Rows, labels, base model, run folder, and what is measured while it trains."""
    check_split(config.data, "train")
    if config.data.validation is not None:
        check_split(config.data, "validation")
    if validation_sample(config):
        check_methods(config.evaluation, [config.evaluation.decode])
    check_trackers(config.training.report_to)
    check_model(config.model.path)
    if config.labels.source == "weak" and not config.label_store.is_dir():
        raise none_found(config.label_store)
    RunFolder.check(config.output)


def check_evaluate(models: Sequence[tuple[Path | None, RunConfig]], methods: Sequence[str]) -> None:
    """Rows, models (adapter and settings), and what answers."""
    for adapter, config in models:
        check_split(config.data, "test")
        check_models(config, [adapter])
        check_methods(config.evaluation, methods)
        if len(models) == len(methods) == 1:
            RunFolder.check(config.output)
        if config.evaluation.occlude and kind_of_regions(read_split(config.data, "test")) == "weak":
            check_label_maker(config.labels)


def check_ask(config: RunConfig, adapter: Path | None, image: Path) -> None:
    """The image, the model, and what answers."""
    load_image(image)
    check_models(config, [adapter])
    check_methods(config.evaluation, [config.evaluation.decode])


def check_models(config: RunConfig, adapters: Iterable[Path | None]) -> None:
    check_model(config.model.path)
    for adapter in adapters:
        if adapter is not None:
            read_adapter(adapter)


def check_methods(evaluation: EvaluationConfig, methods: Sequence[str]) -> None:
    """Decoding methods, and the other settings that answers are made and scored with."""
    for method in methods:
        check_name(method)
    if len(methods) > 1 and evaluation.decoding:
        raise ConfigError("evaluation.decoding: these are settings of one decoding method, give them with one --decode")
    if evaluation.strategy is not None:
        make_strategy(evaluation.strategy)
    check_weights(evaluation.weights)
