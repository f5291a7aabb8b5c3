"""Which settings of a folder hold that may be another's: they lie beside an adapter, or beside answers.

Nobody can tell a run of one's own from a run that a stranger made. So a folder says which model it belongs to, how it
was trained and how it was asked, and nothing that names programs, other models or data of this machine: these are the
user's to give, by `--config` or as an override. A setting that is not listed here is left out.
"""

from dataclasses import fields, replace
from pathlib import Path

from a3tune.config import RunConfig
from a3tune.config.settings import DataConfig
from a3tune.errors import RunError

TAKEN: dict[str, tuple[str, ...]] = {
    "model": ("path", "dtype", "device", "quantization", "device_map"),
    "labels": ("source", "top_k", "threshold"),
    "adapter": (
        "kind",
        "rank",
        "alpha",
        "dropout",
        "expert_rank",
        "expert_alpha",
        "query_experts",
        "key_experts",
        "top_experts",
        "router_hidden",
    ),
    "alignment": ("weight", "until", "heads", "head_selection", "rows", "variant", "membership"),
    "training": (
        "epochs",
        "max_steps",
        "batch_size",
        "accumulation",
        "learning_rate",
        "warmup",
        "scheduler",
        "weight_decay",
        "max_grad_norm",
        "bf16",
        "seed",
        "save_steps",
        "log_steps",
        "workers",
        "activation_checkpointing",
        "load_balance",
        "eval_steps",
        "eval_samples",
        "keep_best",
        "patience",
    ),
    "evaluation": (
        "batch_size",
        "max_new_tokens",
        "decode",
        "decoding",
        "strategy",
        "seed",
        "tau",
        "normalisation",
        "heads",
        "rows",
        "fillings",
        "dilation",
    ),
}
"""Section -> settings that hold. `model.path` may name any folder, but starts no download: `models.check_at_hand`."""

LEFT_OUT = (
    "a folder that may be another's names no programs, other models or data of this machine; "
    "give them yourself where they matter, or vouch for the whole file with --config"
)
"""Why, and what to do."""


def taken_over(theirs: RunConfig, said: RunConfig, *, labels: bool) -> tuple[RunConfig, list[str]]:
    """What holds of settings beside an adapter, and the dotted names of what they say in vain.

    Args:
        theirs: those settings, under what the user said.
        said: what the user said, over the defaults: what is not taken over is as it is here.
        labels: whether the command makes labels; else theirs, as their data, stay as a record of the training.
    """
    settings, left_out = theirs, []
    for section, names in TAKEN.items():
        if section == "labels" and not labels:
            continue
        other, own = getattr(theirs, section), getattr(said, section)
        settings = replace(settings, **{section: replace(own, **{name: getattr(other, name) for name in names})})
        left_out += [
            f"{section}.{field.name}"
            for field in fields(own)
            if field.name not in names and getattr(own, field.name) != getattr(other, field.name)
        ]
    return settings, left_out


def rows_named(data: DataConfig, where: Path) -> DataConfig:
    """The rows that answers belong to, as the settings beside them name them: questions and answers are read there.

    Raises:
        RunError: one is no file or folder: reading a device or a pipe may never end.
    """
    for path in (data.train, data.test):
        if path is not None and path.exists() and not (path.is_file() or path.is_dir()):
            raise RunError(f"{where}: names {path} as its data: expected a file or a folder")
    return data
