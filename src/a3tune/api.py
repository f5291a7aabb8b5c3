"""What `import a3tune` offers: one thin function for each thing that a user of the library wants done.

Knows how people say what they want (paths, pictures, arrays, keywords); the work is that of the rooms below.
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from a3tune.commands import evaluate as evaluating
from a3tune.commands.checks import check_label, check_methods, check_models, check_train
from a3tune.commands.label import label as make_labels
from a3tune.commands.settings import label_settings, model_settings, training_settings
from a3tune.commands.subject import Subject
from a3tune.commands.train import fine_tune
from a3tune.config import Override, RunConfig, load_config
from a3tune.config.ranges import check_head_count
from a3tune.data.images import load_image
from a3tune.data.memory import ImageLike, RowsLike, image_source, rows_of
from a3tune.data.rows import words
from a3tune.errors import ConfigError, DataError, ModelError
from a3tune.evaluation.answer import Answer, RegionLike, as_region, ask
from a3tune.evaluation.evaluate import evaluate as evaluate_samples
from a3tune.evaluation.results import Results
from a3tune.labels.make import LabelMaker, make_maker
from a3tune.labels.store import LabelRun
from a3tune.masks import bounding_box, decode_mask
from a3tune.models import head_total
from a3tune.report.table import FORMATS
from a3tune.report.write import compare as compare_runs
from a3tune.run.folder import RunFolder
from a3tune.types import Box, Region, Sample
from a3tune.vlm.load import Vlm

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
AnyPath = str | PathLike[str]
Progress = Callable[[int, int], None]
"""Told how much is done, and of how much."""


@dataclass(frozen=True, repr=False)
class Model(Vlm):
    """A model that can be asked. Everything that takes a `Vlm` takes it."""

    subject: Subject
    """Its settings, and the folder of its adapter."""

    def __repr__(self) -> str:
        adapter = "" if self.subject.adapter is None else f", adapter={str(self.subject.adapter)!r}"
        return f"Model({self.name!r}{adapter}, {self.model.config.model_type} on {self.device})"

    def ask(self, image: ImageLike, question: str, *, region: RegionLike | None = None, **settings: Any) -> Answer:
        """The answer to a question about an image, and where the model looked.

        Args:
            image: a path, the bytes of an image file, a Pillow image, or an array `[H, W]` or `[H, W, 3]`. Arrays of
                another type than uint8 are windowed to their own range.
            region: where the answer is to be found, as a box or a mask, for methods that are told
                (`decode="controlmllm"`).
            settings: those of `evaluation`: `decode="vcd"`, `max_new_tokens=8`, `seed=1`, `heads=4`, ...; what is not
                said is as in the run of the adapter, else the default.

        Raises DataError for an image or question that cannot be used, ConfigError for a setting, ModelError for what
        the model cannot do.
        """
        words("question", question)
        source = image_source(image)
        regions = None if region is None else (as_region(region, load_image(source)),)
        sample = Sample("question", source, question, "", "open", regions=regions)
        return ask(self, sample, _changed(self.subject.config, settings).evaluation)


@dataclass(frozen=True, eq=False)
class FoundRegion:
    """A segment of an image that a question picks."""

    region: Region
    """As rows and samples have it."""
    similarity: float
    """Cosine of the segment and the question."""

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """bool `[H, W]` of the image."""
        assert self.region.mask is not None
        return decode_mask(self.region.mask)

    @property
    def box(self) -> Box:
        """The smallest box around it: x0, y0, x1, y1 in pixels of the image."""
        assert self.region.mask is not None
        return bounding_box(self.region.mask)


def load(
    path: AnyPath | None = None,
    adapter: AnyPath | None = None,
    *,
    device: "str | torch.device | None" = None,
    dtype: "Literal['auto', 'float32', 'bfloat16', 'float16'] | torch.dtype | None" = None,
    quantization: Literal["4bit", "8bit"] | None = None,
    device_map: str | None = None,
) -> Model:
    """A model to ask, with or without an adapter.

    Args:
        path: "tiny" (shipped in the package), a folder, or a name on the Hugging Face Hub. None: the base that the
            adapter was trained on, as its run says.
        adapter: the folder of an adapter, or of the run that trained it. Without one the base answers.
        device: "cpu", "cuda", "cuda:1" or "mps"; None takes the best that is there.
        dtype: of the weights; None is bfloat16 on CUDA, float32 elsewhere.
        quantization: of the weights; needs the extra `quantize`.
        device_map: "auto" spreads a large model over all devices.

    Raises ModelError and AdapterError for what cannot be loaded, ConfigError for arguments that are none.
    """
    if path is None and adapter is None:
        raise ConfigError('load: expected a model ("tiny", a folder, a name on the Hub) or an adapter, got neither')
    folder = None if adapter is None else _adapter(Path(_path("load: adapter", adapter)))
    said = {
        "path": None if path is None else _path("load: path", path),
        "device": None if device is None else str(device),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "quantization": quantization,
        "device_map": device_map,
    }
    given = _named("model", {name: value for name, value in said.items() if value is not None})
    ((_, config),) = model_settings([folder], None, given, logger.warning)
    check_models(config, [folder])
    subject = Subject(config, folder)
    return Model(**vars(subject.load()), subject=subject)


def find_regions(
    image: ImageLike, question: str, *, device: "str | torch.device" = "auto", **settings: Any
) -> list[FoundRegion]:
    """The segments of an image that a question is about, best first (Eq. 3): what labels are made of.

    Args:
        image: as `Model.ask` takes it.
        settings: those of `labels`: `proposer="sam"`, `weights="models/sam"`, `ranker="models/biomedclip"`,
            `top_k=2`, ... What finds and ranks segments stays loaded until it is asked for other settings.

    Raises ConfigError, ModelError, DataError as the command `a3tune label`.
    """
    words("question", question)
    pairs = _named("labels", settings)
    labels = load_config(None, pairs).labels
    maker = _maker(json.dumps(sorted(pairs), default=fspath), str(device))
    found = maker.find(load_image(image_source(image)), Sample("question", b"", question, "", "open"))
    best = found.labels("question", labels.top_k, labels.threshold)
    return [
        FoundRegion(Region(mask=segment.mask), similarity)
        for segment, similarity in zip(best.segments, best.similarity, strict=True)
    ]


@lru_cache(maxsize=1)
def _maker(settings: str, device: str) -> LabelMaker:
    return make_maker(load_config(None, [(name, value) for name, value in json.loads(settings)]).labels, device)


def label(rows: AnyPath, out: AnyPath, *, progress: Progress = lambda done, total: None, **settings: Any) -> LabelRun:
    """Regions for the rows of a file into a label store, for `train`; what is there already is not made again.

    Args:
        rows: a file or folder, as `read_rows` reads it.
        out: the folder of the store.
        settings: those of `labels`, as in `find_regions`.

    Returns what was done, and which images failed. Raises as the command `a3tune label`.
    """
    where = [("data.train", _path("label: rows", rows)), ("labels.store", _path("label: out", out))]
    config, _ = label_settings(None, [*where, *_named("labels", settings)])
    check_label(config)
    return make_labels(config, progress, logger.warning)[0]


def train(
    config: AnyPath | RunConfig | None = None, *, progress: Progress = lambda done, total: None, **settings: Any
) -> RunFolder:
    """Train an adapter. A run that was stopped goes on in its folder.

    Args:
        config: a YAML file of settings, or a `RunConfig`.
        settings: in place of those of the file, by section:
            `train(data={"train": "train.jsonl"}, labels={"store": "labels"}, output="runs/mine")`.

    Returns the folder of the run: its `adapter` is what `load` takes; so is the folder itself.

    Raises ConfigError for settings, DataError for rows, LabelError without labels, RunError for the folder.
    """
    if isinstance(config, RunConfig):
        if settings:
            raise ConfigError(
                f"train: expected settings in the RunConfig or as keywords, got both ({', '.join(settings)})"
            )
        chosen = config
    else:
        chosen = training_settings(
            None if config is None else Path(_path("train: config", config)), _by_section(settings)
        )
    check_train(chosen)
    return RunFolder(fine_tune(chosen, progress, logger.warning))


def evaluate(
    model: Model,
    rows: RowsLike,
    *,
    out: AnyPath | None = None,
    progress: Progress = lambda done, total: None,
    **settings: Any,
) -> Results:
    """Answers to all rows and their scores; of the attention, too, where the true region is known.

    Args:
        rows: a file or folder, a list of mappings or samples, or a Hugging Face data set (`read_rows`).
        out: a run folder that keeps the answers, for `compare` and reports; only for rows of a file. A stopped
            evaluation goes on in it.
        settings: those of `evaluation`, as in `Model.ask`; `occlude=True` asks again with parts hidden.

    Raises as `evaluation.evaluate.evaluate`.
    """
    if not isinstance(model, Model):
        raise ModelError(f"model: expected what a3tune.load returns, got {type(model).__name__}")
    config, samples = _changed(model.subject.config, settings), rows_of(rows)
    if out is None:
        return evaluate_samples(model, samples, config.evaluation, labels=config.labels, progress=progress)
    if not isinstance(rows, str | PathLike):
        raise DataError("rows: expected a file to evaluate into a folder, which names it; got rows in memory")
    config = replace(
        config, data=replace(config.data, test=Path(fspath(rows))), output=Path(_path("evaluate: out", out))
    )
    return evaluating.evaluate_loaded(replace(model.subject, config=config), model, samples, progress)


def compare(runs: Iterable[AnyPath], *, by: str | None = None, rows: AnyPath | None = None, form: str = ".md") -> str:
    """A table of evaluated runs, each compared with the first: scores, intervals, significance, cost.

    Args:
        runs: folders, or `NAME=FOLDER`.
        by: a field of `meta`: a table for each of its values.
        rows: the questions, where the folder of the first run does not name them.
        form: ".md", ".tex" or ".csv".

    Raises RunError for a folder without an evaluation, or of other questions than the first; ConfigError for arguments
    that are none.
    """
    if isinstance(runs, str | PathLike):
        raise ConfigError(f"compare: runs: expected a list of folders, got one: [{fspath(runs)!r}] is a list of it")
    named = [_path(f"compare: runs[{index}]", run) for index, run in enumerate(runs)]
    if not named:
        raise ConfigError("compare: runs: expected at least one folder, got none")
    if form not in FORMATS:
        raise ConfigError(f"compare: form: expected one of {', '.join(FORMATS)}, got {form!r}")
    (table,) = compare_runs(named, [form], by, None if rows is None else Path(fspath(rows)))
    return table


def read_rows(rows: RowsLike) -> list[Sample]:
    """Samples of a JSONL or parquet file or of a folder saved by `save_to_disk`; or of rows in memory.

    Args:
        rows: a path; or mappings with the fields of a row (`docs/data.md`), such as a list of dicts or a Hugging Face
            data set; or a DataFrame of pandas. Their images may be anything that `Model.ask` takes; a row without `id`
            gets one.

    Raises DataError, which names row and field.
    """
    return rows_of(rows)


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """Settings with those of `evaluation` changed, over the heads and rows of the training."""
    given = load_config(None, _named("evaluation", changes)).evaluation
    changed = replace(config.active_evaluation, **{name: getattr(given, name) for name in changes})
    evaluation = changed.over(config.alignment)
    check_methods(evaluation, [evaluation.decode])
    check_head_count("evaluation.heads", evaluation.heads, head_total(config.model.path))
    return replace(config, evaluation=evaluation)


def _adapter(folder: Path) -> Path:
    """The adapter in the folder of a run, or the folder itself."""
    run = RunFolder(folder)
    return run.adapter if run.config.is_file() and run.adapter.is_dir() else folder


def _named(section: str, settings: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{section}.{name}", _value(value)) for name, value in settings.items()]


def _by_section(settings: dict[str, Any]) -> Sequence[Override]:
    """Keywords, sections as mappings -> overrides."""
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        pairs += _named(name, value) if isinstance(value, dict) else [(name, _value(value))]
    return pairs


def _value(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return fspath(value) if isinstance(value, PathLike) else value


def _path(name: str, value: Any) -> str:
    if not isinstance(value, str | PathLike):
        raise ConfigError(f"{name}: expected a path, got {type(value).__name__}")
    return fspath(value)
