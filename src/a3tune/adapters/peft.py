"""A3MoE as a PEFT adapter type, and the two doors to it: `add_adapter` for training, `load_adapter` for use.

Importing this module registers the type "A3MOE"; a process that never does gets `KeyError: 'A3MOE'` from PEFT.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from a3tune.adapters.config import A3MoEConfig, PeftType
from a3tune.adapters.layer import hand_call
from a3tune.adapters.model import (
    A3MoEModel,
    check_base,
    check_tensors,
    check_values,
    language_linears,
    without_adapter_name,
)
from a3tune.compat.peft import check_target_module_exists, own_module, present_names, register, take_out
from a3tune.config import AdapterConfig
from a3tune.config.settings import EXPERTS
from a3tune.errors import A3TuneError, AdapterError, ConfigError
from a3tune.machine.quiet import ignoring
from a3tune.machine.trial import patterns_end
from a3tune.models import adapter_weights, check_adapter

register(PeftType.A3MOE, A3MoEConfig, A3MoEModel)
_SAID = 300
"""Characters of what PEFT and torch say of a damaged adapter."""


def add_adapter(
    model: PreTrainedModel,
    settings: AdapterConfig | None = None,
    *,
    key_text_tokens: bool = False,
    balance: bool = False,
    control_ids: Sequence[int] = (),
    layout_ids: Sequence[int] = (),
) -> PeftModel:
    """Put a fresh, trainable adapter on all linear layers of the language model; everything else is frozen.

    Args:
        model: the base model; it is changed in place.
        settings: its kind, and the ranks and experts of that kind; None is Appendix C.1. `a3moe` routes `q_proj` and
            `k_proj` (see `A3MoEConfig`); `lora` is PEFT's own LoRA on the same layers: rank, alpha and dropout alone.
        key_text_tokens: route text tokens through K-MoE as well.
        balance: keep the load-balance term of each pass for the trainer.
        control_ids: ids of the tokens that are no text (`Vlm.control_ids`): in `generate` they are kept out of the
            prompt, as in the masks of training batches.
        layout_ids: as `control_ids`, of tokens that are no text inside an image (`Vlm.layout_ids`).

    Raises ConfigError for settings out of range and AdapterError for a model that cannot be routed.
    """
    settings = settings or AdapterConfig()
    plain = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    if settings.kind == "lora":
        config: PeftConfig = LoraConfig(**plain, target_modules=language_linears(model))
    elif settings.kind == "a3moe":
        config = A3MoEConfig(
            **plain,
            **{name: getattr(settings, name) for name in EXPERTS},
            key_text_tokens=key_text_tokens,
            balance=balance,
            control_ids=list(control_ids),
            layout_ids=list(layout_ids),
        )
    else:
        raise ConfigError(f"adapter kind: expected 'a3moe' or 'lora', got {settings.kind!r}")
    with _known_warnings():
        return get_peft_model(model, config)  # type: ignore[return-value]


def load_adapter(model: PreTrainedModel, folder: Path | str, *, trainable: bool = False) -> PeftModel:
    """The base model with the A3MoE or LoRA adapter that `save_pretrained` left in `folder`.

    Raises AdapterError when the folder holds no such adapter, when its weights are not safetensors, not numbers or not
    all there, or when the adapter belongs to another base model. The model is then as it was.
    """
    folder = Path(folder)
    with _known_warnings(), _fitting(folder):
        config = adapter_config(folder)
        shapes = present_names(model, config, _read_shapes(folder))
        _check_patterns(config, [name for name, _ in model.named_modules()], folder)
        if isinstance(config, A3MoEConfig):
            check_base(config.base, model)
        _check_shapes(model, config, shapes, folder)
        _check_sizes(config, shapes, folder)
        with _as_it_was(model):
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
            asked = {*get_peft_model_state_dict(adapted, save_embedding_layers=False)}
            # PEFT also saves embeddings and output head, whole, where they are adapted or the vocabulary has grown.
            embeddings = {*get_peft_model_state_dict(adapted, save_embedding_layers=True)} - asked
            check_tensors(asked, {*shapes} - embeddings)
            return adapted


def adapter_config(folder: Path) -> PeftConfig:
    """The settings of the A3MoE or LoRA adapter in `folder`. Raises AdapterError when it holds none, or is damaged."""
    check_adapter(folder)
    with _fitting(folder):
        return PeftConfig.from_pretrained(str(folder))


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Turn what PEFT raises on a damaged adapter into an AdapterError: it takes adapter_config.json as it stands."""
    try:
        yield
    except A3TuneError as error:
        raise error if str(error).startswith(str(folder)) else type(error)(f"{folder}: {error}") from error
    except Exception as error:
        # torch lists every tensor that does not fit.
        said = " ".join(str(error).split())[:_SAID]
        raise AdapterError(
            f"{folder}: expected a whole adapter, loading it failed ({type(error).__name__}: {said}). Copy it anew."
        ) from error


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """A load that fails takes out again what PEFT has put into the base model by then."""
    adapted_before = any(own_module(module) for module in model.modules())
    try:
        yield
    except Exception:
        if not adapted_before:
            take_out(model, (hand_call, A3MoEModel.route_pass))
        raise


@contextmanager
def _known_warnings() -> Iterator[None]:
    """PEFT 0.21 asks the model by a name that transformers has deprecated; nobody but PEFT can mend that.

    What it warns of when tensors are missing is an error here, and the one dimension of a bias (`lora_bias`) is right.
    """
    with (
        ignoring(r"Adapter .* LoRA tensor\(s\) have invalid shape"),
        ignoring("Found missing adapter keys"),
        ignoring("`is_gradient_checkpointing` is deprecated", FutureWarning),
    ):
        yield


def _read_shapes(folder: Path) -> dict[str, list[int]]:
    """By key, without the adapter's name. Raises AdapterError for weights that cannot be read or used."""
    path = adapter_weights(folder)
    try:
        with safe_open(path, framework="pt") as tensors:
            shapes: dict[str, list[int]] = {}
            for key in tensors.keys():  # noqa: SIM118
                values = tensors.get_tensor(key)
                check_values(key, values)
                shapes[without_adapter_name(key)] = list(values.shape)
            return shapes
    except SafetensorError as error:
        raise AdapterError(f"{path}: not a readable safetensors file ({error}). Copy the adapter anew.") from error


def _check_patterns(config: PeftConfig, names: Sequence[str], folder: Path) -> None:
    """AdapterError if a regular expression of the settings is none, or does not end on the names of the layers."""
    settings = config.to_dict()
    given = [settings.get(name) or [] for name in ("target_modules", "exclude_modules", "layers_pattern")]
    patterns = [pattern for pattern in given if isinstance(pattern, str)]
    # As PEFT puts the keys of these together.
    keys = {*(settings.get("rank_pattern") or {}), *(settings.get("alpha_pattern") or {})}
    if not patterns_end([*patterns, *(rf"(.*\.)?({key})$" for key in sorted(keys))], names):
        raise AdapterError(
            f"{folder}: adapter_config.json: expected regular expressions that are soon matched against the names of "
            f"the {len(names)} layers; one of target_modules, exclude_modules, layers_pattern, rank_pattern or "
            "alpha_pattern is none, or runs on without end. List the names of the layers."
        )


def _check_sizes(config: PeftConfig, shapes: dict[str, list[int]], folder: Path) -> None:
    """AdapterError if PEFT would make larger matrices than the file holds: a line of JSON can ask for any rank."""
    settings = config.to_dict()
    ranks = [settings.get(name) or 0 for name in ("r", "expert_rank", "query_experts", "key_experts", "router_hidden")]
    asked = max(*ranks, *(settings.get("rank_pattern") or {}).values())
    largest = max((side for shape in shapes.values() for side in shape), default=0)
    if asked > largest:
        raise AdapterError(
            f"{folder}: adapter_config.json asks for matrices of {asked} rows, its weights have at most {largest}. "
            "Copy the adapter anew."
        )


def _check_shapes(model: PreTrainedModel, config: PeftConfig, shapes: dict[str, list[int]], folder: Path) -> None:
    """AdapterError unless the adapter holds exactly the layers it would adapt in `model`, of fitting widths."""
    targets = {name: layer for name, layer in model.named_modules() if check_target_module_exists(config, name)}
    name = type(model).__name__
    adapted = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in shapes if ".lora_" in key}
    if adapted != set(targets):
        stray = sorted(adapted ^ set(targets))[0]
        raise AdapterError(
            f"{folder}: adapter of another base model: it adapts {len(adapted)} layers, {name} has {len(targets)} to "
            f"adapt (first difference: {stray}). Load the base model that the adapter was trained on."
        )
    for key, shape in shapes.items():
        path, _, weight = key.removeprefix("base_model.model.").partition(".lora_")
        layer = targets.get(path)
        expected, got = None, None
        if isinstance(layer, nn.Linear) and weight in ("A.weight", "experts.A.weight"):
            expected, got = layer.in_features, shape[1]
        elif isinstance(layer, nn.Linear) and weight in ("B.weight", "experts.B.weight"):
            expected, got = layer.out_features, shape[0]
        if expected != got:
            raise AdapterError(
                f"{folder}: adapter of another base model: its layer {path} is {got} wide, that of {name} is "
                f"{expected}. Load the base model that the adapter was trained on."
            )
