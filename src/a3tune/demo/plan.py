"""What the demo does: its methods, settings and places (`assets/demo/`). Light, so that a dry run is there at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from a3tune.config import RunConfig, load_config
from a3tune.errors import ConfigError

_OWN = ("data.train", "data.test", "labels.store", "output", "labels.source", "adapter.kind")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the demo does with its settings: `assets/demo/recipe.yaml` says what each means."""

    patients: dict[str, int]
    marks: float
    questions: list[str]
    seed: int
    methods: dict[str, list[str]]
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Demo:
    """A demo with everything decided."""

    folder: Path
    recipe: Recipe
    configs: Mapping[str, RunConfig]
    """Of the base model and of every method, by name."""

    def stages(self) -> dict[str, float]:
        """Name -> about how many seconds, in their order."""
        about = self.recipe.seconds
        stages = {"data": about["data"], "labels": about["labels"]}
        for name in self.configs:
            stages |= {f"train_{name}": about["train"]} if name in self.recipe.methods else {}
            stages |= {f"evaluate_{name}": about["evaluate"]}
        return stages | {"report": about["report"]}


def read_recipe() -> Recipe:
    """The recipe as shipped."""
    return Recipe(**yaml.safe_load(_asset("recipe.yaml").read_text(encoding="utf-8")))


def shipped_settings(overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of the demo, changed by overrides such as `training.epochs=1`. Raises ConfigError for others."""
    return load_config(_asset("config.yaml"), overrides)


def plan_demo(folder: Path, overrides: Sequence[str] = ()) -> Demo:
    """Recipe and settings, changed by overrides such as `patients.train=20` or `training.epochs=1`. Touches nothing.

    A setting that is given holds for all methods, in place of what the recipe says of one.

    Raises ConfigError for an override that does not fit, and for settings that are the demo's own: its places, and what
    its methods are called by.
    """
    recipe = read_recipe()
    given: list[str] = []
    for override in overrides:
        if override.startswith("patients."):
            _change_patients(recipe.patients, override)
        elif override.partition("=")[0] in _OWN:
            raise ConfigError(f"{override}: the demo sets this itself; for data and methods of your own: a3tune train")
        else:
            given.append(override)
    places = [f"data.{split}={folder / 'data' / split}.jsonl" for split in ("train", "test")]
    places += [f"labels.store={folder / 'labels'}"]
    configs = {
        name: shipped_settings([*differences, *given, *places, f"output={folder / name}"])
        for name, differences in {"base": [], **recipe.methods}.items()
    }
    return Demo(folder, recipe, configs)


def _change_patients(patients: dict[str, int], override: str) -> None:
    key, _, value = override.partition("=")
    split = key.removeprefix("patients.")
    if split not in patients:
        raise ConfigError(f"{override}: expected one of {', '.join(f'patients.{name}' for name in patients)}")
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{override}: {key}: expected an integer >= 1, got {value}")
    patients[split] = int(value)


def _asset(name: str) -> Path:
    return Path(str(files("a3tune") / "assets" / "demo" / name))
