"""How a model answers: every decoding baseline of the paper by its name, and `generate`, which counts what it costs.

A new method is a file with a `base.Decoder`, and a line in `DECODERS`.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from a3tune.decoding.strategy import STRATEGIES, Strategy, make_strategy
from a3tune.errors import ConfigError, ModelError
from a3tune.machine.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from a3tune.decoding.base import Decoder
    from a3tune.decoding.watching import Watcher
    from a3tune.vlm.load import Vlm

__all__ = [
    "DECODERS",
    "STRATEGIES",
    "Generated",
    "Strategy",
    "check_decoder",
    "check_name",
    "generate",
    "make_decoder",
    "make_strategy",
]

_HERE = "a3tune.decoding"
DECODERS: Registry[type["Decoder"]] = Registry(
    {
        "sampling": f"{_HERE}.plain:Sampling",
        "greedy": f"{_HERE}.plain:Greedy",
        "beam": f"{_HERE}.plain:Beam",
        "nucleus": f"{_HERE}.plain:Nucleus",
        "vcd": f"{_HERE}.vcd:Vcd",
        "dola": f"{_HERE}.dola:Dola",
        "opera": f"{_HERE}.opera:Opera",
        "avisc": f"{_HERE}.avisc:Avisc",
        "m3id": f"{_HERE}.m3id:M3id",
        "damro": f"{_HERE}.damro:Damro",
        "pai": f"{_HERE}.pai:Pai",
        "controlmllm": f"{_HERE}.controlmllm:ControlMllm",
    }
)
"""By name, in the order of the paper's tables."""


@dataclass(frozen=True, slots=True)
class Generated:
    """Answers, and what they cost."""

    tokens: "list[Tensor]"
    """Per sample int64 `[S_new]` on the CPU, up to the end token and with it."""
    passes: int
    """Forward passes of the language model, all branches together."""
    seconds: float
    peak_bytes: int | None
    """Most memory in use on a CUDA device, the model's included; None elsewhere."""


def check_name(name: str) -> None:
    """Raises ConfigError for a method that is not in `DECODERS`. Loads nothing."""
    if name not in DECODERS:
        raise ConfigError(f"decode: expected one of {', '.join(DECODERS)}, got {name!r}")


def make_decoder(name: str, settings: Mapping[str, Any] | None = None) -> "Decoder":
    """A method of `DECODERS` with other settings than the published ones.

    Raises ConfigError for an unknown name or setting, or a value that it cannot have.
    """
    from pydantic import TypeAdapter, ValidationError

    check_name(name)
    decoder: Any = DECODERS[name]
    known = [field.name for field in fields(decoder)]
    for setting in settings or {}:
        if setting not in known:
            raise ConfigError(f"decode {name}: no setting {setting!r}; it has: {', '.join(known) or 'none'}")
    try:
        return TypeAdapter(decoder).validate_python(dict(settings or {}))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"decode {name}: {where}: {problem['msg']}, got {problem['input']!r}") from None


def check_decoder(
    decoder: "Decoder", vlm: "Vlm", *, regions_known: bool = True, strategy: str | Strategy | None = None
) -> None:
    """Whether a method can answer; raises before anything is asked.

    Args:
        regions_known: all true regions are told to the method.
        strategy: as in `generate`.

    Raises ModelError when the model lacks what the method needs, or when it must be told all true regions and not all
    are known; ConfigError for a strategy that it cannot have.
    """
    if getattr(decoder, "needs_regions", False) and not regions_known:
        raise ModelError(f"{decoder.name}: needs the true regions of every question, and some have none")
    if getattr(decoder, "searches", False) and make_strategy(strategy or decoder.strategy).do_sample:
        raise ConfigError(f"decode {decoder.name}: searches with beams, so it cannot sample; strategy: beam or greedy")
    decoder.check(vlm)


def generate(
    vlm: "Vlm",
    inputs: Mapping[str, Any],
    decode: "str | Decoder" = "greedy",
    *,
    strategy: str | Strategy | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    regions_BN: "Tensor | None" = None,
    settings: Mapping[str, Any] | None = None,
    watcher: "Watcher | None" = None,
) -> Generated:
    """Answer a batch.

    Args:
        inputs: of `vlm.encode` with `padding_side="left"`, on the model's device, without `TOKEN_MASKS`.
        decode: a name in `DECODERS`, or a method made by `make_decoder`.
        strategy: how the next token is chosen: a name in `STRATEGIES`, or one of your own; None is the method's own.
        max_new_tokens: longest answer.
        seed: of all random numbers, in sampling and in noise.
        regions_BN: see `base.Decoder`.
        settings: of the method, where they differ from the published ones.
        watcher: is told of every pass and token (`watching.Watcher`), and may end answers.

    Raises ConfigError for unknown names, and ModelError when the model lacks what the method needs.
    """
    import torch

    from a3tune.decoding.watching import watching

    decoder = make_decoder(decode, settings) if isinstance(decode, str) else decode
    config = make_strategy(decoder.strategy if strategy is None else strategy).config(vlm, max_new_tokens)
    check_decoder(decoder, vlm, strategy=strategy)
    generator = torch.Generator(vlm.device).manual_seed(seed)
    cuda = vlm.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(vlm.device)
    with torch.no_grad(), _passes(vlm, watcher) as passes, watching(watcher):
        start = time.perf_counter()
        tokens_BS = decoder(vlm, dict(inputs), config, regions_BN=regions_BN, generator=generator).cpu()
        seconds = time.perf_counter() - start
    ends: Any = config.eos_token_id
    return Generated(
        tokens=[_until_end(tokens_S, ends, vlm.tokenizer.pad_token_id) for tokens_S in tokens_BS],
        passes=len(passes),
        seconds=seconds,
        peak_bytes=torch.cuda.max_memory_allocated(vlm.device) if cuda else None,
    )


@contextmanager
def _passes(vlm: "Vlm", watcher: "Watcher | None") -> Iterator[list[None]]:
    """A list that grows by one with every forward pass of the language model, of which the watcher is told before."""
    passes: list[None] = []

    def count(module: Any, arguments: Any) -> None:
        if watcher is not None:
            watcher.before_pass()
        passes.append(None)

    hook = vlm.model.get_decoder().register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        hook.remove()


def _until_end(tokens_S: "Tensor", ends: list[int], pad: int) -> "Tensor":
    """Up to the end token, with it; an answer that a text ended (`stop_strings`) has padding behind it instead.

    A padding token that the model chose amid its answer ends nothing, as in published code.
    """
    import torch

    ends_at = torch.isin(tokens_S, torch.tensor(ends)).nonzero()
    if len(ends_at):
        return tokens_S[: int(ends_at[0]) + 1]
    said = (tokens_S != pad).nonzero()
    return tokens_S[: int(said[-1]) + 1 if len(said) else 0]
