"""Medical checkpoints of the original LLaVA code -> transformers' LLaVA format, that `load_vlm` reads.

Works tensor by tensor: a model of 7 billion parameters takes some 3 GB of memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from a3tune.convert import huatuo, llava_med, llava_med_15
from a3tune.convert.stream import HEAD, open_checkpoint, read_config, weight_files, write_checkpoint, writing
from a3tune.errors import ModelError, OutputError
from a3tune.machine.digests import write_digests
from a3tune.machine.files import replacing_folder

if TYPE_CHECKING:
    from a3tune.convert.llava import Plan

KINDS: dict[str, ModuleType] = {"llava_med": llava_med, "llava_med_15": llava_med_15, "huatuo": huatuo}
"""What can be converted. A new one is a file with `TITLE`, `matches`, `check` and `plan`, and a line here."""


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    folder: Path
    kind: str
    """Name in `KINDS`."""
    tensors: int
    nbytes: int
    """Of the weights."""


def convert(
    source: Path,
    out: Path,
    *,
    kind: str | None = None,
    base: Path | None = None,
    tower: Path | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Convert a published checkpoint; `out` is then whole, or not there at all.

    Args:
        source: the downloaded folder.
        out: the new folder.
        kind: name in `KINDS`; None finds out.
        base: the model that delta weights are added to.
        tower: the CLIP vision tower, for checkpoints without one.
        force: take the place of a model that is there.
        progress: called with the number of tensors written, and of all.

    Raises:
        ModelError: the checkpoint is of no known kind, not whole, or does not fit its base or tower.
        OutputError: `out` is there already, or cannot be written.
        RunError: another conversion into `out` is under way.
    """
    kind = check(source, out, kind=kind, base=base, tower=tower, force=force)
    plan = KINDS[kind].plan(open_checkpoint(source), open_checkpoint(base) if base else None, tower)
    _check(plan, source)
    with replacing_folder(out, partial(_refuse_to_overwrite, out, source, force)) as folder:
        write_checkpoint(plan.tensors, folder, progress)
        with writing(out):
            plan.config.architectures = ["LlavaForConditionalGeneration"]
            plan.config.save_pretrained(folder)
            plan.generation.save_pretrained(folder)
            plan.processor.save_pretrained(folder)
            write_digests(folder)
    return Converted(out, kind, len(plan.tensors), sum(tensor.nbytes for tensor in plan.tensors))


def check(
    source: Path,
    out: Path,
    *,
    kind: str | None = None,
    base: Path | None = None,
    tower: Path | None = None,
    force: bool = False,
    weights: bool = True,
) -> str:
    """The name in `KINDS` of what `convert` would convert; without `weights` only settings are looked at.

    Raises what `convert` raises, as far as that can be told before anything slow is imported.
    """
    kind = detect(source) if kind is None else kind
    if kind not in KINDS:
        raise ModelError(f"kind {kind!r} is not known; known kinds: {_known()}.")
    KINDS[kind].check(source, base)
    for folder in (source, base, tower):
        if folder is not None:
            read_config(folder)
            if weights:
                weight_files(folder)
    _refuse_to_overwrite(out, source, force)
    return kind


def detect(source: Path) -> str:
    """Which kind of checkpoint a folder holds, by its `config.json`. Raises `ModelError` for another."""
    config = read_config(source)
    for kind, module in KINDS.items():
        if module.matches(config):
            return kind
    raise ModelError(f"{source}: {_described(config)}; known kinds: {_known()}.")


def _refuse_to_overwrite(out: Path, source: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise OutputError(f"{out}: is there already. Choose another folder, or say that it may be replaced.")
    if not (out / "config.json").is_file() or out.samefile(source):
        raise OutputError(f"{out}: is not a converted model, so it is not replaced. Choose another folder.")


def _described(config: Mapping[str, Any]) -> str:
    if "text_config" in config:
        return (
            f"a {config.get('model_type')!r} in transformers' format needs no conversion: `load_vlm` takes it as it is"
        )
    return f"a checkpoint of model_type {config.get('model_type')!r} cannot be converted"


def _known() -> str:
    return ", ".join(f"{kind} ({module.TITLE})" for kind, module in KINDS.items())


def _check(plan: "Plan", source: Path) -> None:
    """Before anything is written: exactly the tensors that transformers' model has, in its shapes."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(plan.config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    planned = {tensor.name: tensor.shape for tensor in plan.tensors}
    if plan.config.tie_word_embeddings:
        wanted.pop(HEAD)
        planned.pop(HEAD, None)
    for name in sorted(wanted.keys() | planned.keys()):
        if wanted.get(name) != planned.get(name):
            expected, got = (list(side[name]) if name in side else "none" for side in (wanted, planned))
            raise ModelError(
                f"{source}: weights and config.json do not fit: {name} should have shape {expected}, found {got}. "
                "Files are missing, or of different models."
            )
