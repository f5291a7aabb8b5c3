"""Settings as text: YAML in and out, `key=value` overrides, and a line for a person about what does not fit.

Knows no setting by name; the tree is `settings.py`.
"""

import json
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union

from pydantic import TypeAdapter, ValidationError

from a3tune.config import plain_yaml
from a3tune.config.settings import RunConfig
from a3tune.errors import ConfigError

Override = str | tuple[str, Any]
"""`labels.top_k=2`, or from Python its name and its value."""


def load_config(path: Path | None, overrides: Iterable[Override] = ()) -> RunConfig:
    """Settings of a YAML file (None: the defaults), changed by overrides such as `labels.top_k=2`.

    Raises ConfigError, which names every setting that is unknown, of the wrong type or out of range.
    """
    return load_given(path, overrides)[0]


def load_given(path: Path | None, overrides: Iterable[Override] = ()) -> tuple[RunConfig, set[str]]:
    """`load_config`, and the dotted names of the settings that the file or overrides give: all others are defaults that
    nobody chose. The file is read once: it may be a pipe.
    """
    tree = {} if path is None else _parse_yaml(_read(path), str(path))
    origin: dict[str, str] = {}
    for override in overrides:
        key, value, said = _parts(override)
        origin[key] = said
        _set(tree, key, value, said)
    config = _validate(tree, lambda key: origin.get(key, str(path or "defaults")))
    return config, {
        f"{section}.{name}" if name else section
        for section, content in tree.items()
        for name in (content if isinstance(content, dict) else [""])
    }


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` reads back as an equal configuration.

    Raises ConfigError when a setting changed in Python (`dataclasses.replace`) is out of range.
    """
    tree = asdict(config, dict_factory=lambda items: {k: str(v) if isinstance(v, Path) else v for k, v in items})
    _validate(tree, lambda _: "configuration")
    return plain_yaml.dump(tree)


ELSEWHERE = {
    "lr": "training.learning_rate",
    "gradient_accumulation_steps": "training.accumulation",
    "gradient_checkpointing": "training.activation_checkpointing",
    "per_device_train_batch_size": "training.batch_size",
    "num_train_epochs": "training.epochs",
    "warmup_ratio": "training.warmup",
    "lr_scheduler_type": "training.scheduler",
    "logging_steps": "training.log_steps",
    "early_stopping_patience": "training.patience",
    "metric_for_best_model": "training.keep_best",
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
}
"""What other programs call a setting of ours."""
_ADAPTER = TypeAdapter(RunConfig)
_LONGEST = 2**18
"""Letters of a file of settings: all of them are 3,000, and YAML takes a second for 100,000."""


def _validate(tree: dict[str, Any], source: Callable[[str], str]) -> RunConfig:
    """`source` tells where the setting of a dotted key was given."""
    # A section whose every line is commented out reads as null.
    tree = {
        key: {} if value is None and is_dataclass(_types(RunConfig).get(key)) else value for key, value in tree.items()
    }
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as error:
        problems = dict.fromkeys(_problem(problem, source) for problem in error.errors(include_url=False))
        raise ConfigError("\n".join(problems)) from None


def _problem(problem: Mapping[str, Any], source: Callable[[str], str]) -> str:
    """One line for a person out of one of pydantic's errors."""
    annotation: Any = RunConfig
    parts: list[str] = []
    for part in problem["loc"]:
        if not is_dataclass(annotation):
            break  # the rest names the branch of a union
        parts.append(str(part))
        annotation = _types(annotation).get(str(part))
    key = ".".join(parts)
    if annotation is None:
        return f"{source(key)}: {key}: no such setting{_suggestion(parts)}"
    if problem["type"] == "value_error":
        return f"{source(key)}: {key}: {problem['ctx']['error']}"
    expected = f"settings ({', '.join(_types(annotation))})" if is_dataclass(annotation) else _expected(annotation)
    return f"{source(key)}: {key}: expected {expected}, got {_shown(problem['input'])}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _types(section: Any) -> dict[str, Any]:
    return {name: kind for name, kind in typing.get_type_hints(section, include_extras=True).items() if name[0] != "_"}


def _expected(annotation: Any) -> str:
    """What a setting takes, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return str(arguments[1].description)
    if origin is Literal:
        return ", ".join(arguments[:-1]) + " or " * (len(arguments) > 1) + arguments[-1]
    if origin in (Union, UnionType):
        return " or ".join(_expected(argument) for argument in arguments)
    return "null"


def _suggestion(parts: list[str]) -> str:
    """The known settings nearest to an unknown one: a near name in its section, or the same name in another section."""
    *section, name = parts
    known = list(keys())
    near = [ELSEWHERE[name]] if name in ELSEWHERE else []
    near = near or [".".join([*section, match]) for match in get_close_matches(name, _siblings(section), n=1)]
    near = near or [key for key in known if key.rpartition(".")[2] == name]
    near = near or get_close_matches(".".join(parts), known, n=1)
    return f"; did you mean {' or '.join(near)}?" if near else f"; expected one of {', '.join(_siblings(section))}"


def _siblings(section: list[str]) -> list[str]:
    return list(_types(_types(RunConfig)[section[0]] if section else RunConfig))


def keys() -> Iterator[str]:
    """Dotted names of all settings."""
    for name, kind in _types(RunConfig).items():
        yield from (f"{name}.{leaf}" for leaf in _types(kind)) if is_dataclass(kind) else (name,)


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LONGEST + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text; byte {error.start} is not") from None
    except OSError as error:
        raise ConfigError(f"{path}: expected a YAML file that can be read: {error.strerror}") from None
    if len(text) > _LONGEST:
        raise ConfigError(f"{path}: expected settings of at most {_LONGEST:,} letters, got more")
    return text


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        tree = plain_yaml.load(text)
    except plain_yaml.Error as error:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected lines such as 'labels:', got {_shown(tree)}")
    return tree


def _parts(override: Override) -> tuple[str, Any, str]:
    """Key and value of an override, and how messages call it."""
    if isinstance(override, tuple):
        return *override, "settings"
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override}: expected key=value, such as labels.top_k=2")
    return key, _override_value(key, text), override


def _override_value(key: str, text: str) -> Any:
    """The value of `key=text`. Text stays text: `{question}` and `2024` mean other things in YAML.

    A mapping (`{alpha: 0.5}`) is one only where a setting takes it.
    """
    if not text:
        raise ConfigError(f"{key}=: expected a value, got none")
    annotation: Any = RunConfig
    for part in key.split("."):
        annotation = _types(annotation).get(part) if is_dataclass(annotation) else None
    if _takes_text(annotation) and text != "null":
        return text
    try:
        value = plain_yaml.load(text)
    except plain_yaml.Error:
        return text
    refused = isinstance(value, list) or (isinstance(value, dict) and not _takes_mapping(annotation))
    return text if refused else value


def _takes_mapping(annotation: Any) -> bool:
    arguments = typing.get_args(annotation)
    return typing.get_origin(annotation) is Annotated and typing.get_origin(arguments[0]) is dict


def _takes_text(annotation: Any) -> bool:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        return arguments[0] in (str, Path)
    return typing.get_origin(annotation) is not Literal and any(_takes_text(argument) for argument in arguments)


def _set(tree: dict[str, Any], key: str, value: Any, override: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        inner = tree.get(section)
        tree[section] = inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise ConfigError(f"{override}: {section} holds no settings, it is {_shown(inner)}")
        tree = inner
    tree[name] = value
