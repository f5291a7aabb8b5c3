"""How runs were measured, in words, and which of their scores cannot be compared for it.

What is compared is what answers: the model, its adapter, its decoding method and their chance. How long an answer may
be, and how it is scored, is the yardstick.
"""

from collections.abc import Mapping
from typing import get_args

from a3tune.config import EvaluationConfig
from a3tune.metrics.catalogue import SCALED, Kind
from a3tune.metrics.reliance import Hiding

_ROWS = {
    "answer": "the rows that choose the answer's tokens",
    "prompt": "the prompt's text rows",
    "after_image": "all text rows after the image",
}


def unlike(settings: Mapping[str, EvaluationConfig], hidings: Mapping[str, Hiding | None]) -> dict[Kind, str]:
    """Kinds of metrics whose scores cannot be compared -> why. Settings and hidings (None: it hid nothing) are those of
    runs by their titles."""
    if len({chosen.max_new_tokens for chosen in settings.values()}) > 1:
        return dict.fromkeys(get_args(Kind), cut_at(settings))
    found: dict[Kind, str] = {}
    if len({_way(chosen) for chosen in settings.values()}) > 1:
        found["attention"] = measured_over(settings)
    hidden = [hiding for hiding in hidings.values() if hiding is not None]
    if any(hiding != hidden[0] for hiding in hidden):
        found["reliance"] = measured_by_hiding(hidings)
    return found


def cut_at(settings: Mapping[str, EvaluationConfig]) -> str:
    """A sentence about runs by their titles whose answers may have different lengths; empty if they may not."""
    if len({chosen.max_new_tokens for chosen in settings.values()}) == 1:
        return ""
    each = ", ".join(f"{title} {chosen.max_new_tokens}" for title, chosen in settings.items())
    return (
        f"Answers were cut at different lengths (evaluation.max_new_tokens: {each}), so that neither scores nor passes "
        "and seconds can be compared."
    )


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


def measured_by_hiding(hidings: Mapping[str, Hiding | None]) -> str:
    """As `measured_over`, of reliance; empty if no run measured it."""
    hidden = {title: hiding for title, hiding in hidings.items() if hiding is not None}
    if not hidden:
        return ""
    first = next(iter(hidden.values()))
    if all(hiding == first for hiding in hidden.values()):
        return f"Reliance: {_in_words(first)}."
    each = "; ".join(f"{title}: {_in_words(hiding)}" for title, hiding in hidden.items())
    return f"Reliance was measured in different ways, so that its scores cannot be compared. {each}."


def _in_words(hiding: Hiding) -> str:
    regions = "the true regions"
    if hiding.regions == "weak":
        count = f"{hiding.top_k} segments" if hiding.top_k != 1 else "segment"
        regions = f"weak labels, since no region is known (the {count} most similar to the question)"
    around = f" and {100 * hiding.dilation:g} % of the longer side around them" if hiding.dilation else ""
    return f"{regions}{around} were hidden, with {', '.join(hiding.fillings)} in their place"
