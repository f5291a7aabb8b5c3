"""Checkpoints to convert, folders or names of the Hugging Face Hub -> folders, looked at before their weights come."""

from pathlib import Path

from a3tune import bases
from a3tune.convert import check
from a3tune.machine import hub


def fetch(
    source: str, out: Path, *, base: str | None = None, tower: str | None = None, force: bool = False
) -> tuple[Path, Path | None, Path | None]:
    """The folders of checkpoint, base and tower for `convert`.

    Names of the Hub, `owner/name` or `owner/name@revision`, are downloaded into its cache where that lacks them: as
    safetensors, or as the `pytorch_model.bin` of which only tensors are read. All that is told by their settings is
    told first.

    Raises what `convert` raises, as far as that can be told before anything slow is imported.
    """

    def folders(weights: bool) -> tuple[Path, Path | None, Path | None]:
        folder = _folder(source, weights)
        beside, eye = (None if name is None else _folder(name, weights) for name in (base, tower))
        check(folder, out, base=beside, tower=eye, force=force, weights=weights)
        return folder, beside, eye

    folders(weights=False)
    return folders(weights=True)


def _folder(name: str, weights: bool) -> Path:
    if hub.named(name, "model") is None:
        return Path(name)
    return bases.fetch(name, weights=weights, pickled=True)
