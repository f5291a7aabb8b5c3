"""Fine-tune medical vision-language models that look at the region the question asks about.

Ask a model:

    load            a model, with or without an adapter: `vlm = a3tune.load("tiny")`
    Model           what it returns: `vlm.ask("scan.png", "Is there a lesion?")`
    Answer          what that returns: `.text`, `.tokens`, `.map`, `.picture()`, `.scores(region)`

Make one:

    find_regions    where a question asks to look, without training (Eq. 3)
    label           the same for rows of questions, kept in a folder
    train           an adapter: returns the folder of the run
    A3MoEConfig     the adapter alone, for `peft.get_peft_model`
    Alignment       the alignment loss for a training loop of your own
    AlignmentMixin  the same for a Trainer of transformers or TRL

Measure it:

    read_rows       questions about images, from a file or from memory
    Sample, Region  one of them, and where its answer is to be found
    evaluate        answers, attention and their scores
    compare         a table of evaluated runs

What a user can mend is raised as `A3TuneError`; its kinds stand in `a3tune.errors`. Settings are keywords: those of
`docs/api/settings.md`. Nothing slow is imported before it is used. The other modules may change; what is documented of
them stands in `docs/api`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a3tune import errors
    from a3tune.adapters import A3MoEConfig
    from a3tune.api import Answer, Model, compare, evaluate, find_regions, label, load, read_rows, train
    from a3tune.errors import A3TuneError
    from a3tune.training.mixin import AlignmentMixin
    from a3tune.training.step import Alignment
    from a3tune.types import Region, Sample

__version__ = "0.1.0"
__all__ = [
    "A3MoEConfig",
    "A3TuneError",
    "Alignment",
    "AlignmentMixin",
    "Answer",
    "Model",
    "Region",
    "Sample",
    "compare",
    "errors",
    "evaluate",
    "find_regions",
    "label",
    "load",
    "read_rows",
    "train",
]
_ELSEWHERE = {
    "A3MoEConfig": "a3tune.adapters",
    "A3TuneError": "a3tune.errors",
    "Alignment": "a3tune.training.step",
    "AlignmentMixin": "a3tune.training.mixin",
    "Region": "a3tune.types",
    "Sample": "a3tune.types",
}
"""Where names live that are not of `a3tune.api`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "errors":
        return import_module("a3tune.errors")
    return getattr(import_module(_ELSEWHERE.get(name, "a3tune.api")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
