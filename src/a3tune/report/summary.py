"""The sentences of a report, made from its numbers: what came out, what it does not show, what the words mean."""

import math
from collections.abc import Sequence

from a3tune.metrics.attention import Normalisation
from a3tune.metrics.catalogue import describe, in_order
from a3tune.report.records import ReportData, RunResult

NOTHING = "\N{EN DASH}"
"""Stands where there is no number."""


def number(value: float, metric: str, *, signed: bool = False) -> str:
    """A value of a metric as people read it (`Metric.text`), without its unit."""
    return typographic(describe(metric).text(value, signed=signed))


def typographic(text: str) -> str:
    """A number or interval as tables write it, with a real minus sign; a dash where there is none."""
    return text.replace("-", "\N{MINUS SIGN}") or NOTHING


def headline(data: ReportData) -> str:
    """The first sentence of the page, by rule: the run that it is about against the reference, on what; every measure
    that differs significantly, to the better and to the worse, in the order of the catalogue, the first of each with
    its numbers; how many do not differ."""
    reference, shown = _compared(data)
    about = _listed([f"{count:,} {name}" for name, count in data.counts.items()])
    about += " (synthetic scans)" if data.synthetic else ""
    better, worse, open_ = [], [], 0
    for metric in in_order(shown.differences):
        comparison = shown.differences[metric]
        if comparison.significant:
            rose = comparison.difference.mean > 0
            side = better if rose != describe(metric).lower_is_better else worse
            side.append(metric)
        else:
            open_ += math.isfinite(comparison.difference.mean)
    told = f"{shown.title} against {reference.title}, on the same {about}"
    if shown is reference or not (better or worse or open_):
        return f"{shown.title} answered {about}."
    if not better and not worse:
        measures = f"none of the {open_} measures shows" if open_ > 1 else "the one measure does not show"
        return f"{told}: {measures} a difference that could not be chance."
    sides = [
        f"{way} in {_by_how_much(changed, shown, reference)}"
        for way, changed in (("better", better), ("worse", worse))
        if changed
    ]
    rest = f"; in {open_} other measure{'s' if open_ > 1 else ''} nothing that could not be chance" if open_ else ""
    nothing = "" if better and worse else "; nothing got worse for sure" if better else "; nothing got better for sure"
    return f"{told}: {'; '.join(sides)}{nothing}{rest}."


def by_test(data: ReportData) -> str:
    """One sentence: in which tests the run that the page is about is right more, or less, often than the reference."""
    reference, shown = _compared(data)
    if shown is reference or not data.tests:
        return ""
    parts = []
    for test, found in data.tests.items():
        comparison, own, other = found[shown.name].comparison, found[shown.name].share, found[reference.name].share
        assert comparison is not None  # it is not the reference
        levels = f"{100 * own.mean:.0f} against {100 * other.mean:.0f} %"
        low, high = (
            typographic(f"{100 * end:+.0f}") for end in (comparison.difference.low, comparison.difference.high)
        )
        sure = f"95 % interval {low} to {high} points" if comparison.significant else "which may be chance"
        parts.append(f"{test}, {levels} ({sure})")
    return f"{shown.title} against {reference.title}, right answers: {'; '.join(parts)}."


def _compared(data: ReportData) -> tuple[RunResult, RunResult]:
    """The reference, and the run that the page is about."""
    by_name = {result.name: result for result in data.results}
    return by_name[data.reference], by_name.get(data.shown, data.results[-1])


def summary(data: ReportData) -> tuple[str, ...]:
    """All runs against the reference, sentence by sentence."""
    reference = next(result for result in data.results if result.name == data.reference)
    counts = _listed([f"{count:,} {name}" for name, count in data.counts.items()])
    kind = "synthetic scans" if data.synthetic else "the test set"
    sentences = [
        f"{_listed([result.title for result in data.results])} answered the same questions about {kind} ({counts}); "
        f"differences are counted question by question against {reference.title}."
    ]
    sentences += [_outcome(result, reference) for result in data.results]
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
    if any("reliance_inside" in result.scores for result in data.results):
        fixed.append(
            "An image with a part hidden is unlike any that a model was trained on, and any such change changes some "
            "answers: compare what hiding the region does with what hiding as much elsewhere does."
        )
    fixed.append(trust(data.seeds))
    return (*fixed, *data.notes)


def glossary(tau: float, normalisation: Normalisation, metrics: Sequence[str]) -> dict[str, str]:
    """Every name on the page, with its formula in words; `metrics` are the names of those that it shows."""
    known = [describe(name) for name in metrics]
    terms = {metric.title: metric.explained(tau, normalisation) for metric in known}
    return terms | {
        "95 % interval": "From a bootstrap that resamples whole groups (images or patients), since questions about "
        "one image are not independent. Of a paired difference: from the differences question by question. Each is of "
        "its number alone, not adjusted for how many there are; the p-values of differences are.",
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


def _outcome(result: RunResult, reference: RunResult) -> str:
    """Where a run is better, worse, or not to be told apart from the reference."""
    higher, lower, same = [], [], []
    for metric in in_order(result.differences):
        comparison = result.differences[metric]
        if not math.isfinite(comparison.difference.mean):
            continue
        if comparison.significant:
            (higher if comparison.difference.mean > 0 else lower).append(_levels(metric, result, reference))
        else:
            same.append(_inline(describe(metric).title))
    if not higher and not lower:
        return f"{result.title}: no significant difference from {reference.title} in {_listed(same)}." if same else ""
    parts = [f"{way} in {_listed(changed)}" for way, changed in (("higher", higher), ("lower", lower)) if changed]
    sentence = f"{result.title} is significantly {' and '.join(parts)}"
    return sentence + (f"; there is no significant difference in {_listed(same)}." if same else ".")


def _by_how_much(changed: list[str], result: RunResult, reference: RunResult) -> str:
    """Such as `yes/no questions answered right (47.6 instead of 35.7 %; 95 % interval +4.0 to +19.8 points)`, and the
    names of the others."""
    first, *others = changed
    known, difference = describe(first), result.differences[first].difference
    level, before = (number(each.scores[first].mean, first) for each in (result, reference))
    low, high = (number(value, first, signed=True) for value in (difference.low, difference.high))
    unit, points = (" %", " points") if known.percent else ("", "")
    told = f"{known.plain or _inline(known.title)} ({level} instead of {before}{unit}; "
    told += f"95 % interval {low} to {high}{points})"
    return told + (f", also in {_listed([_inline(describe(name).title) for name in others])}" if others else "")


def _levels(metric: str, result: RunResult, reference: RunResult) -> str:
    known = describe(metric)
    level, reference_level = (number(each.scores[metric].mean, metric) for each in (result, reference))
    return f"{_inline(known.title)} ({level} against {reference_level}{' %' if known.percent else ''})"


def trust(seeds: int) -> str:
    """What the numbers do not hold."""
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
