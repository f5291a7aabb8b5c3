"""The sentences of a report, made from its numbers: what came out, what it does not show, what the words mean."""

import math
from collections.abc import Sequence

from a3tune.metrics.attention import Normalisation
from a3tune.report.records import METRICS, SCALED, MethodResult, ReportData

NOTHING = "\N{EN DASH}"
"""Stands where there is no number."""


def number(value: float, metric: str, *, signed: bool = False) -> str:
    """A value of a metric as tables show it: percent with one decimal or a plain number with three."""
    if not math.isfinite(value):
        return NOTHING
    text = f"{100 * value:.1f}" if METRICS[metric].percent else f"{value:.3f}"
    if float(text) == 0:
        text = text.lstrip("-")
    elif signed and value > 0:
        text = f"+{text}"
    return text.replace("-", "\N{MINUS SIGN}")


def summary(data: ReportData) -> tuple[str, ...]:
    """One paragraph, sentence by sentence."""
    reference = next(method for method in data.methods if method.name == data.reference)
    counts = _listed([f"{count:,} {name}" for name, count in data.counts.items()])
    kind = "synthetic scans" if data.synthetic else "the test set"
    sentences = [
        f"{_listed([method.title for method in data.methods])} answered the same questions about {kind} ({counts}); "
        f"differences are counted question by question against {reference.title}."
    ]
    sentences += [_outcome(method, reference) for method in data.methods]
    sentences.append(_trust(data.seeds))
    return tuple(filter(None, sentences))


def limits(data: ReportData) -> tuple[str, ...]:
    """What a reader must not conclude."""
    fixed = [
        "This is research software and not a medical device. Nothing on this page may guide the care of a patient."
    ]
    if data.synthetic:
        fixed.append(
            "The scans are synthetic: drawn organs with drawn lesions. They show that the method does what it says, "
            "not how it does on patients."
        )
    fixed.append(
        "Attention on a region is not proof that the answer rests on it, and a right answer is not proof that the "
        "model looked there."
    )
    fixed.append(_trust(data.seeds))
    return (*fixed, *data.notes)


def glossary(tau: float, normalisation: Normalisation, metrics: Sequence[str]) -> dict[str, str]:
    """Every name on the page, with its formula in words; `metrics` are those of `METRICS` that it shows."""
    shown = [METRICS[name] for name in metrics]
    terms = {m.title: m.meaning.format(tau=f"{tau:g}", scaled=SCALED[normalisation]) for m in shown}
    return terms | {
        "95 % interval": "From a bootstrap that resamples whole groups (images or patients), since questions about "
        "one image are not independent. Of a paired difference: from the differences question by question.",
        "L_LLM": "Mean negative log-probability of the reference answer's tokens (Eq. 11).",
        "L_align": "How far the attention of the selected heads, averaged, is from the labelled regions: small when "
        "the share of image attention inside them is large (Eq. 10). Its weight is lambda (Eq. 12).",
        "Visual attention ratio": "Of a head's attention on image and prompt, the share on the image (Eq. 8). The R "
        "heads with the highest ratio are selected and aligned (Eq. 9).",
        "Weak labels": "Regions found without annotation: an image is cut into segments, and the K most similar to "
        "the prompt are kept (Eq. 3).",
        "Recall at K": "Share of the questions whose true region is matched by one of the K weak labels.",
        "Best IoU": "Of the K weak labels, the largest overlap with the true region: shared pixels over all of both.",
        "Ceiling": "Recall if all segments were kept: ranking cannot do better.",
        "Gate entropy": "Spread of a router's weights in nats: log(number of experts) when all get the same, 0 when "
        "one gets everything.",
        "Question only": "The most frequent training answer to the same question, without seeing any image.",
    }


def _outcome(method: MethodResult, reference: MethodResult) -> str:
    """Where a method is better, worse, or not to be told apart from the reference."""
    higher, lower, same = [], [], []
    for metric, known in METRICS.items():
        comparison = method.differences.get(metric)
        if comparison is None or not math.isfinite(comparison.difference.mean):
            continue
        if comparison.significant:
            (higher if comparison.difference.mean > 0 else lower).append(_levels(metric, method, reference))
        else:
            same.append(_inline(known.title))
    if not higher and not lower:
        return f"{method.title}: no significant difference from {reference.title} in {_listed(same)}." if same else ""
    parts = [f"{way} in {_listed(changed)}" for way, changed in (("higher", higher), ("lower", lower)) if changed]
    sentence = f"{method.title} is significantly {' and '.join(parts)}"
    return sentence + (f"; there is no significant difference in {_listed(same)}." if same else ".")


def _levels(metric: str, method: MethodResult, reference: MethodResult) -> str:
    known = METRICS[metric]
    own, other = (number(m.scores[metric].mean, metric) for m in (method, reference))
    return f"{_inline(known.title)} ({own} against {other}{' %' if known.percent else ''})"


def _trust(seeds: int) -> str:
    if seeds == 1:
        return (
            "One training run per method says little: another seed can turn small differences round, and the "
            "intervals only hold the chance in the choice of test questions."
        )
    few = ", and so few cannot show their full spread" if seeds < 5 else ""
    chance = "the intervals hold the chance of seeds and of test questions"
    return f"Each method was trained with {seeds} seeds{few}; {chance}."


def _inline(title: str) -> str:
    return title[0].lower() + title[1:]


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
