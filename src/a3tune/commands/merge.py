"""`a3tune merge`: a plain LoRA adapter added to its base, with a model card."""

from pathlib import Path

from a3tune.convert.merge import Merged, merge
from a3tune.report.card import merged_card


def merge_adapter(adapter: Path, out: Path, *, base: str | None = None, force: bool = False) -> Merged:
    """`convert.merge.merge` with our card."""
    return merge(adapter, out, merged_card, base=base, force=force)
