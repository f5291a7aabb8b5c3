"""Over which heads and text rows the attention of runs was measured, in words; and that runs differ, if they do."""

from collections.abc import Mapping

from a3tune.config import EvaluationConfig

_ROWS = {
    "answer": "the rows that choose the answer's tokens",
    "prompt": "the prompt's text rows",
    "after_image": "all text rows after the image",
}


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
        share = f"the {heads} heads"
    elif isinstance(heads, float):
        share = f"the {100 * heads:g} % of all heads"
    else:
        share = f"the {heads} of all heads"
    return f"{share} that look at the image most, and over {_ROWS[settings.rows or 'answer']}"
