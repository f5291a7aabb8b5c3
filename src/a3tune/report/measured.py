"""How the attention of runs was measured, in words: over which heads and text rows, and on which scale."""

from collections.abc import Iterable, Mapping

from a3tune.config import EvaluationConfig
from a3tune.metrics.catalogue import SCALED

_ROWS = {
    "answer": "the rows that choose the answer's tokens",
    "prompt": "the prompt's text rows",
    "after_image": "all text rows after the image",
}


def alike(settings: Iterable[EvaluationConfig]) -> bool:
    """Whether scores of attention can be compared."""
    return len({_way(chosen) for chosen in settings}) == 1


def measured_over(settings: Mapping[str, EvaluationConfig]) -> str:
    """A sentence about runs by their titles; settings as `RunConfig.active_evaluation` has them."""
    ways = {title: _way(chosen) for title, chosen in settings.items()}
    if len(set(ways.values())) == 1:
        return f"Attention is averaged over {next(iter(ways.values()))}."
    each = "; ".join(f"{title}: {way}" for title, way in ways.items())
    return f"Attention was measured in different ways, so that its scores cannot be compared. {each}."


def _way(settings: EvaluationConfig) -> str:
    heads = settings.heads
    if isinstance(heads, int):
        share = f"the {heads} heads" if heads > 1 else "the one head"
    elif isinstance(heads, float):
        share = f"the {100 * heads:g} % of all heads"
    else:
        share = f"the {heads} of all heads"
    rows = _ROWS[settings.rows or "answer"]
    scale = f"{SCALED[settings.normalisation]}, with {settings.tau:g} as Coverage's threshold"
    return f"{share} that look at the image most, and over {rows}, {scale}"
