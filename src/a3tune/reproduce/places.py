"""Where the models and data sets of the paper are on this machine, or the phantom in the place of all of them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from a3tune.commands.checks import check_label, check_methods
from a3tune.config import DataConfig, RunConfig, load_config, plain_yaml
from a3tune.data.images import split_fragment
from a3tune.data.rows import check_split, read_rows, write_rows
from a3tune.demo.plan import read_recipe
from a3tune.errors import ConfigError, DataError, in_short, shown
from a3tune.models import check_model
from a3tune.reproduce.experiments import Experiment, paper_asset
from a3tune.run.stages import Stages

REGIONS = "-regions"
"""Ends the name of a data set of which only the questions with a known region count."""
REPORTS = ("iu-xray", "mimic-cxr")
PHANTOM = "phantom"
_MODELS = ("llava-med", "llava-med-1.5", "huatuogpt-vision")
"""The paper's."""
_DEMO = Path(str(files("a3tune") / "assets" / "demo" / "config.yaml"))
"""Settings on the phantom."""
_TEST = "random"
"""Of the phantom's tests: the mark names any answer, as one of another hospital would."""
_PAPER = ("alignment.until=null",)
"""In place of the demo's settings: what the paper says of it."""
_REPORT_SETTINGS = ("evaluation.max_new_tokens=96", "training.epochs=3")
"""Reports are long, and no mark names them."""
_PHANTOM_CLASSES = {
    ("organ", "Lung"): ("body", "chest"),
    ("organ", "Abdomen"): ("body", "abdomen"),
    ("organ", "Brain"): ("body", "brain"),
    ("organ", "Brain_Tissue"): ("body", "brain"),
}
"""Field and value of SLAKE -> of the phantom."""


@dataclass(frozen=True, slots=True)
class Places:
    """Models and data by the paper's names."""

    models: Mapping[str, str]
    """Name -> `model.path`."""
    data: Mapping[str, Path]
    """Name -> folder with `train.jsonl` and `test.jsonl` (`a3tune data prepare`)."""
    settings: Mapping[str, tuple[str, ...]]
    """Data set -> its settings, in their order."""
    base: Path | None = None
    """YAML of further settings; None: the defaults."""
    classes: Mapping[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    """Field and value of `meta` that are called otherwise here."""
    stand_in: bool = False
    """The phantom: published numbers are of other data, so no difference to them means anything."""

    def config(self, model: str, data: str, overrides: Sequence[str]) -> RunConfig:
        """Settings of a run on a data set, without output. Raises ConfigError for what is not there."""
        for kind, name, known in (("models", model, self.models), ("data", data, self.data)):
            if name not in known:
                raise ConfigError(f"{kind}.{name}: expected its place, got none; it is needed here")
        folder = self.data[data]
        given = [f"model.path={self.models[model]}", f"data.train={folder / 'train.jsonl'}"]
        given += [f"data.test={folder / 'test.jsonl'}", *self.settings[data.removesuffix(REGIONS)], *overrides]
        return _load(self.base, tuple(given))


_load = lru_cache(maxsize=None)(load_config)
"""A table asks for the settings of a few runs again and again."""


def check_places(on: str, settings: Sequence[str], chosen: Sequence[Experiment], *, runs: bool = True) -> None:
    """Raises what `reproduce` could not use for any of `chosen`, before hours of work on the rest. Writes nothing.

    Without `runs` it only writes what is there: neither images nor models have to be.

    Raises:
        ConfigError: the file is none, or names a place or a setting that is not there.
        DataError, LabelError, ModelError: rows, their images, what makes labels, or a model cannot be used.
    """
    if on == PHANTOM:
        load_config(_DEMO, settings)
        _check_models("the phantom", _MODELS, chosen)
        return
    tree = _places(Path(on))
    load_config(None, tree["settings"])
    _check_models(on, tree["models"], chosen)
    needed = {column.data.removesuffix(REGIONS) for experiment in chosen for column in experiment.columns}
    data = {name: folder for name, folder in tree["data"].items() if name in needed}
    for name, folder in data.items():
        _check_rows(f"{on}: data.{name}", folder, images=runs and any(experiment.asks for experiment in chosen))
    if not runs:
        return
    places = Places(tree["models"], data, _settings_of(tree))
    asked = [experiment for experiment in chosen if experiment.asks and experiment.model in places.models]
    aligned = any(row.adapter == "a3tune" for experiment in asked for row in experiment.rows)
    for name, model in product(data, dict.fromkeys(experiment.model for experiment in asked)):
        config = places.config(model, name, ())
        check_model(config.model.path)
        check_methods(config.evaluation, [])
        if aligned and config.labels.source == "weak":
            check_label(config)


def _check_rows(where: str, folder: Path, *, images: bool) -> None:
    """Both splits of a data set, and that their images are there."""
    for split in ("train", "test"):
        file = folder / f"{split}.jsonl"
        if not file.is_file():
            from_here = "" if folder.is_absolute() else f" below {Path.cwd()}, where you are"
            raise ConfigError(
                f"{where}: expected train.jsonl and test.jsonl in {folder}{from_here}; there is no {file.name} "
                f"(`a3tune data prepare DOWNLOAD --out {folder}` writes both)"
            )
        if not images:
            check_split(DataConfig(train=file), "train")
            continue
        paths = dict.fromkeys(row.image for row in read_rows(file) if isinstance(row.image, Path))
        absent = [path for path in paths if not split_fragment(path)[0].is_file()]
        if absent:
            raise DataError(
                f"{where}: {len(absent):,} of the {len(paths):,} images of {file} are not there, as {absent[0]}; put "
                "them back, or prepare the data set again"
            )


def _check_models(where: str, models: Collection[str], chosen: Sequence[Experiment]) -> None:
    lacking = [experiment.model for experiment in chosen if experiment.asks and experiment.model not in models]
    if lacking and len(lacking) == len(chosen):
        there = ", ".join(models) or "none"
        raise ConfigError(
            f"{where}: models.{lacking[0]}: expected its place, got none; give it, or ask a model that is there "
            f"(--model NAME, of {there})"
        )


def read_places(path: Path, out: Path) -> Places:
    """The places in a YAML file: `models` (name: path), `data` (name: folder), `settings` (list of key=value).

    The paper's settings of each data set (Tables 6-7, Appendix C.1) apply, then `settings`. Raises ConfigError for a
    file that is none.
    """
    tree = _places(path)
    return Places(tree["models"], tree["data"] | _with_regions(tree["data"], out), _settings_of(tree))


def _settings_of(tree: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The paper's settings of each data set, then those of the file."""
    paper = yaml.safe_load(paper_asset("settings.yaml"))
    return {name: (*paper["shared"], *paper["data"][name], *tree["settings"]) for name in tree["data"]}


def _places(path: Path) -> dict[str, Any]:
    """The three parts of a file of places."""
    try:
        tree = plain_yaml.load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: expected a file with models, data and settings: {error.strerror}") from None
    except (UnicodeDecodeError, plain_yaml.Error) as error:
        raise ConfigError(f"{path}: expected YAML with models, data and settings: {in_short(error)}") from None
    if not isinstance(tree, dict) or not set(tree) <= {"models", "data", "settings"}:
        raise ConfigError(f"{path}: expected a mapping with models, data and settings, got {shown(tree)}")
    for part in ("models", "data"):
        named = tree[part] = tree.get(part) or {}
        if not isinstance(named, dict) or not all(isinstance(text, str) for pair in named.items() for text in pair):
            raise ConfigError(f"{path}: {part}: expected names with their places (NAME: FOLDER), got {shown(named)}")
    settings = tree.get("settings") or []
    if not isinstance(settings, list) or not all(isinstance(setting, str) for setting in settings):
        raise ConfigError(f"{path}: settings: expected a list of KEY=VALUE, got {shown(settings)}")
    known = yaml.safe_load(paper_asset("settings.yaml"))["data"]
    if unknown := sorted(set(tree["data"]) - set(known)):
        near = get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{path}: data: expected names of {', '.join(known)}, got {', '.join(unknown)}{hint}")
    data = {name: Path(folder) for name, folder in tree["data"].items()}
    return {"models": tree["models"], "data": data, "settings": tuple(settings)}


def phantom_places(
    out: Path, settings: Sequence[str], progress: Callable[[int, int], None], patients: Mapping[str, int] | None = None
) -> Places:
    """Phantom scans in `out` for every data set, the shipped tiny model for every model, the demo's settings.

    The scans of questions carry the demo's marks. Those of the test name any answer, those of reports there are none.
    """
    from a3tune.data.phantom import write_phantom

    paper, recipe = yaml.safe_load(paper_asset("settings.yaml")), read_recipe()
    folders = {False: out / "data" / "vqa", True: out / "data" / "reports"}
    stages, drawn = Stages(out / "stages", lambda line: None), patients or recipe.patients
    marked = {"marks": recipe.marks, "types": recipe.questions}
    for reports, folder in folders.items():

        def draw(folder: Path = folder, reports: bool = reports) -> None:
            written = write_phantom(folder, drawn, reports=reports, progress=progress, **({} if reports else marked))
            if not reports:
                write_rows(written["test"], [row for row in read_rows(written["test"]) if row.meta["test"] == _TEST])

        inputs = {"patients": dict(drawn), "reports": reports} | ({} if reports else {**marked, "test": _TEST})
        stages.run(folder.name, inputs, [folder], draw)
    data = {name: folders[name in REPORTS] for name in paper["data"]}
    settings_of = {name: (*_PAPER, *(_REPORT_SETTINGS if name in REPORTS else ()), *settings) for name in paper["data"]}
    return Places(
        dict.fromkeys(_MODELS, "tiny"),
        data | _with_regions(data, out),
        settings_of,
        _DEMO,
        _PHANTOM_CLASSES,
        stand_in=True,
    )


def _with_regions(data: Mapping[str, Path], out: Path) -> dict[str, Path]:
    """SLAKE's questions whose region is known, as a data set of its own (Fig. 4)."""
    if "slake" not in data:
        return {}
    folder = out / "data" / f"slake{REGIONS}"
    for split in ("train", "test"):
        write_rows(folder / f"{split}.jsonl", [s for s in read_rows(data["slake"] / f"{split}.jsonl") if s.regions])
    return {f"slake{REGIONS}": folder}
