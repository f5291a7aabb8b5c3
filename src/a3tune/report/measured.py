"""How attention and reliance of runs were measured, in words, and whether they can be compared."""

from collections.abc import Iterable, Mapping
from typing import Any

from a3tune.config import EvaluationConfig
from a3tune.metrics.catalogue import SCALED, Kind

_ROWS = {
    "answer": "the rows that choose the answer's tokens",
    "prompt": "the prompt's text rows",
    "after_image": "all text rows after the image",
}


def unlike(settings: Iterable[EvaluationConfig], ways: Iterable[Mapping[str, Any] | None]) -> frozenset[Kind]:
    """Kinds of metrics whose scores cannot be compared.

    `ways` are how parts of the images were hidden (`evaluation.reliance_log.read_way`).
    """
    hidden = [way for way in ways if way is not None]
    kinds: dict[Kind, bool] = {
        "attention": len({_way(chosen) for chosen in settings}) > 1,
        "reliance": any(way != hidden[0] for way in hidden),
    }
    return frozenset(kind for kind, differs in kinds.items() if differs)


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


def measured_by_hiding(ways: Mapping[str, Mapping[str, Any] | None]) -> str:
    """As `measured_over`, of reliance; empty if no run measured it."""
    hidden = {title: way for title, way in ways.items() if way is not None}
    if not hidden:
        return ""
    first = next(iter(hidden.values()))
    if all(way == first for way in hidden.values()):
        return f"Reliance: {_in_words(first)}."
    each = "; ".join(f"{title}: {_in_words(way)}" for title, way in hidden.items())
    return f"Reliance was measured in different ways, so that its scores cannot be compared. {each}."


def _in_words(way: Mapping[str, Any]) -> str:
    regions = "the true regions"
    if way["regions"] == "weak":
        labels = way["labels"]
        regions = (
            f"weak labels, since no region is known (the {labels['top_k']} segments most similar to the question, "
            f"proposed by {labels['proposer']['name']})"
        )
    around = f" and {100 * way['dilation']:g} % of the longer side around them" if way["dilation"] else ""
    return f"{regions}{around} were hidden, with {', '.join(way['fillings'])} in their place"
