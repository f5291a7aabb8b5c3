"""The `RunConfig` tree: every setting of a run, YAML in and out, `key=value` overrides.

Knows names, types and ranges; not what the settings do. Relative paths, in a YAML file too, are relative to the current
directory, as on the command line. Defaults are the paper's (Appendix C.1) where it gives one.
"""

import json
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from types import UnionType
from typing import Annotated, Any, Literal, Union

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from a3tune import plain_yaml
from a3tune.errors import ConfigError

Count = Annotated[int, Field(strict=True, ge=1, description="an integer >= 1")]
Natural = Annotated[int, Field(strict=True, ge=0, description="an integer >= 0")]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32, description="an integer >= 0 and < 2**32")]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description="a number > 0")]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False, description="a number >= 0")]
Share = Annotated[float, Field(strict=True, ge=0, le=1, description="a number >= 0 and <= 1")]
Fraction = Annotated[float, Field(strict=True, gt=0, le=1, description="a number > 0 and <= 1")]
Cosine = Annotated[float, Field(strict=True, ge=-1, le=1, description="a number >= -1 and <= 1")]
Dropout = Annotated[float, Field(strict=True, ge=0, lt=1, description="a number >= 0 and < 1")]
Switch = Annotated[bool, Field(strict=True, description="true or false")]
Text = Annotated[str, Field(strict=True, min_length=1, description="text")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N")]
FilePath = Annotated[Path, Field(description="a path")]
Options = Annotated[
    dict[str, bool | int | float | str], Field(description="settings such as {min_area: 0.001}: names and plain values")
]


class _Section:
    """A group of settings; an unknown one is an error."""

    __slots__ = ()
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class ModelConfig(_Section):
    path: Text = "tiny"
    """`tiny` (shipped in the package), a folder, or a name on the Hugging Face Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen weights; `auto` is bfloat16 on CUDA, float32 elsewhere."""
    device: Device = "auto"
    """auto, cpu, mps, cuda or cuda:N."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Of the frozen weights (QLoRA); needs the extra `quantize`."""
    device_map: Text | None = None
    """`auto` spreads a model over all devices; null puts it on `device`."""


@dataclass(frozen=True, slots=True)
class DataConfig(_Section):
    """Rows in the public format, as JSONL, as parquet or as a Hugging Face data set on disk (`data/rows.py`)."""

    train: FilePath | None = None
    validation: FilePath | None = None
    test: FilePath | None = None


@dataclass(frozen=True, slots=True)
class LabelsConfig(_Section):
    """Where to look (section 4.1)."""

    source: Literal["weak", "truth", "none"] = "weak"
    """`weak`: proposed and ranked. `truth`: the data set's own regions. `none`: no alignment, whatever its weight."""
    proposer: Text = "superpixels"
    """Name in the registry of `labels/propose`: superpixels, sam (SAM, SAM-HQ, SAM 2), medsam, litemedsam."""
    weights: FilePath | None = None
    """Folder of the proposer's weights, where it has any."""
    proposal: Options = field(default_factory=dict)
    """The proposer's own settings, in place of its defaults."""
    ranker: Text = "tiny"
    """`tiny` (shipped in the package), or the folder of a BiomedCLIP, CLIP or SigLIP."""
    visual_prompt: Text = "dim"
    """How a segment is shown to the ranker: a name in the registry of `labels/rank`."""
    query: Text = "{question}"
    """What the ranker reads. `{question}` is the prompt, other names in braces are keys of a sample's `meta`."""
    top_k: Count = 4
    """K of Eq. 3, the segments kept per sample: >= 1."""
    threshold: Cosine | None = None
    """Segments less similar to the query than this are dropped as well: -1 to 1."""
    store: FilePath | None = None
    """Folder of the label store; null keeps it inside the output folder."""
    workers: Count = 1
    """Processes that label images: >= 1."""
    backend: Literal["process", "ray"] = "process"
    """Where they are: `process`, on this machine; `ray`, in the Ray cluster at RAY_ADDRESS (extra `ray`)."""

    def __post_init__(self) -> None:
        try:
            names = [name for _, name, _, _ in Formatter().parse(self.query) if name is not None]
        except ValueError as error:
            raise ValueError(f"query {self.query!r} is no template ({error}); write a literal brace twice") from None
        if not all(names):
            raise ValueError(f"query {self.query!r} has braces without a name in them; expected such as '{{question}}'")


@dataclass(frozen=True, slots=True)
class AdapterConfig(_Section):
    """What is trained (section 4.2.1)."""

    kind: Literal["a3moe", "lora"] = "a3moe"
    """`lora`: plain LoRA on all linear modules of the language model, without experts."""
    rank: Count = 64
    """Of the LoRA matrices: >= 1."""
    alpha: Count = 16
    """LoRA's scale is alpha / rank: >= 1."""
    dropout: Dropout = 0.0
    """On the adapters' input: >= 0, < 1."""
    expert_rank: Count = 16
    """r of one expert: >= 1."""
    expert_alpha: Count = 8
    """An expert's scale is expert_alpha / expert_rank: >= 1."""
    query_experts: Natural = 4
    """O_q of Eq. 5: >= 0; 0 leaves Q-MoE out, plain LoRA in its place."""
    key_experts: Natural = 8
    """O_k of Eq. 7: >= 0; 0 leaves K-MoE out, plain LoRA in its place."""
    top_experts: Count = 2
    """B of Eq. 7, the experts used per image token: >= 1, <= key_experts."""
    router_hidden: Count = 64
    """Hidden width of the routers' MLP (Eq. 4, 6): >= 1."""

    def __post_init__(self) -> None:
        if 0 < self.key_experts < self.top_experts:
            raise ValueError(
                f"top_experts is {self.top_experts} but there are only {self.key_experts} key_experts; "
                "lower top_experts or raise key_experts"
            )


@dataclass(frozen=True, slots=True)
class AlignmentConfig(_Section):
    """How attention is pulled to the regions (sections 4.2.2 and 4.2.3)."""

    weight: NonNegative = 0.1
    """Lambda of Eq. 12: >= 0; Table 7 has .02 to .12."""
    heads: Count | Fraction = 0.125
    """R of Eq. 9: a count >= 1, or a fraction of all heads as a decimal number > 0 and <= 1 (1.0: all, 1: one).

    The paper has 128 of 1,024.
    """
    head_selection: Literal["batch", "running", "fixed"] = "batch"
    """Ratios that choose the heads: this batch's (the paper's), their running average, or a calibration pass's."""
    rows: Literal["after_image", "answer", "prompt"] = "after_image"
    """Text rows whose attention is averaged."""
    variant: Literal["paper", "code"] = "paper"
    """Eq. 10 as printed, or as in the published code (a ratio per text row, then the mean of squares)."""
    membership: Fraction = 0.5
    """Share of an image token's box that a region must cover to hold the token: > 0, <= 1."""


@dataclass(frozen=True, slots=True)
class TrainingConfig(_Section):
    epochs: Positive = 3.0
    """> 0."""
    max_steps: Count | None = None
    """Optimiser steps, in place of epochs: >= 1."""
    batch_size: Count = 8
    """Samples per device and forward pass: >= 1."""
    accumulation: Count = 1
    """Forward passes per optimiser step: >= 1."""
    learning_rate: Positive = 2e-4
    """Peak: > 0."""
    warmup: Share = 0.03
    """Share of all steps: 0 to 1."""
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 1.0
    """>= 0; 0 does not clip."""
    bf16: Literal["auto"] | Switch = "auto"
    """Mixed precision; `auto`: where the device has it."""
    seed: Seed = 0
    """Of weights, order and dropout: >= 0."""
    save_steps: Count = 500
    """Optimiser steps between checkpoints: >= 1."""
    log_steps: Count = 10
    """Optimiser steps between lines of `metrics.jsonl`: >= 1."""
    workers: Natural = 0
    """Processes that load data; 0 loads in the main one."""
    activation_checkpointing: Switch = False
    """Recompute activations in the backward pass: less memory, more time."""
    load_balance: NonNegative = 0.0
    """Weight of the routers' load-balance term: >= 0; the paper has none."""


@dataclass(frozen=True, slots=True)
class EvaluationConfig(_Section):
    batch_size: Count = 16
    """Samples per forward pass: >= 1."""
    max_new_tokens: Count = 64
    """Longest answer, in tokens: >= 1."""
    decode: Text = "greedy"
    """Decoding method: sampling, greedy, beam, nucleus, vcd, dola, opera, avisc, m3id, damro, pai, controlmllm."""
    decoding: Options = field(default_factory=dict)
    """The method's own settings, in place of the published ones."""
    strategy: Text | None = None
    """greedy, beam, nucleus or sampling, in place of the method's own way to choose a token."""
    seed: Seed = 0
    """Of sampling and noise."""
    weights: Options = field(default_factory=dict)
    """Folders of what report metrics need: nltk_data, bertscore, chexbert, radgraph, ratescore."""
    tau: Fraction = 0.15
    """Coverage's threshold on the normalised map (Appendix D.2): > 0, <= 1."""
    normalisation: Literal["max", "sum", "min-max"] = "max"
    """Of the map, before Coverage and Intensity; the paper does not name its own."""


@dataclass(frozen=True, slots=True)
class RunConfig(_Section):
    """All settings of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: FilePath = Path("runs/a3tune")
    """The run folder."""


def load_config(path: Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """Settings of a YAML file (None: the defaults), changed by overrides such as `labels.top_k=2`.

    Raises ConfigError, which names every setting that is unknown, of the wrong type or out of range.
    """
    tree = {} if path is None else _parse_yaml(_read(path), str(path))
    origin: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override}: expected key=value, such as labels.top_k=2")
        origin[key] = override
        _set(tree, key, _override_value(key, text), override)
    return _validate(tree, lambda key: origin.get(key, str(path or "defaults")))


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` reads back as an equal configuration.

    Raises ConfigError when a setting changed in Python (`dataclasses.replace`) is out of range.
    """
    tree = asdict(config, dict_factory=lambda items: {k: str(v) if isinstance(v, Path) else v for k, v in items})
    _validate(tree, lambda _: "configuration")
    return plain_yaml.dump(tree)


_ADAPTER = TypeAdapter(RunConfig)


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
    keys = list(_keys())
    near = [".".join([*section, match]) for match in get_close_matches(name, _siblings(section), n=1)]
    near = near or [key for key in keys if key.rpartition(".")[2] == name]
    near = near or get_close_matches(".".join(parts), keys, n=1)
    return f"; did you mean {' or '.join(near)}?" if near else f"; expected one of {', '.join(_siblings(section))}"


def _siblings(section: list[str]) -> list[str]:
    return list(_types(_types(RunConfig)[section[0]] if section else RunConfig))


def _keys() -> Iterator[str]:
    """Dotted names of all settings."""
    for name, kind in _types(RunConfig).items():
        yield from (f"{name}.{leaf}" for leaf in _types(kind)) if is_dataclass(kind) else (name,)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text; byte {error.start} is not") from None
    except OSError as error:
        raise ConfigError(f"{path}: expected a YAML file that can be read: {error.strerror}") from None


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


def _override_value(key: str, text: str) -> Any:
    """The value of `key=text`. Text stays text: `{question}` and `2024` mean other things in YAML."""
    annotation: Any = RunConfig
    for part in key.split("."):
        annotation = _types(annotation).get(part) if is_dataclass(annotation) else None
    if _takes_text(annotation) and text != "null":
        return text
    try:
        value = plain_yaml.load(text)
    except plain_yaml.Error:
        return text
    return text if isinstance(value, dict | list) else value


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
