"""The model card beside an adapter: README.md, Markdown with the front matter of the Hugging Face Hub.

Results stand between two marks, where each evaluation writes its own; all else of a card is its owner's to change.
Knows settings and numbers; nothing of the machine or the patients behind them.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from a3tune.config import RunConfig
from a3tune.config.public import is_hub_name, public_name, public_settings
from a3tune.errors import OutputError
from a3tune.machine.files import write_atomic
from a3tune.metrics.catalogue import SCALED, describe, in_order
from a3tune.metrics.reliance import Hiding
from a3tune.metrics.stats import Estimate
from a3tune.report.escape import markdown
from a3tune.report.measured import measured_by_hiding, measured_over
from a3tune.report.records import LabelQuality
from a3tune.report.summary import number, typographic
from a3tune.report.table import interval_text
from a3tune.text import one_line

_RESEARCH = "Research only. This is **not a medical device**: no one may be diagnosed or treated by its answers."
logger = logging.getLogger(__name__)
CARD = "README.md"
"""File of an adapter's folder."""
RESULTS = (
    "<!-- a3tune eval: written anew by every evaluation from here on -->",
    "<!-- a3tune eval: to here; everything else is yours -->",
)
"""Marks around the results."""
_SOURCES = {
    "weak": "weak labels: segments proposed in each image and ranked by the prompt, without annotation",
    "truth": "the data set's own regions of interest",
    "none": "none: trained on answers alone",
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an adapter reached on some data by one decoding method."""

    data: str
    """Name of the questions that anybody may read."""
    questions: int
    config: RunConfig
    scores: Mapping[str, Estimate]
    """By metric (`metrics.catalogue`)."""
    hiding: Hiding | None = None
    """How parts of the images were hidden; None if they were not."""


def model_card(
    config: RunConfig,
    counts: Mapping[str, int],
    *,
    data: str = "",
    labels: LabelQuality | None = None,
    synthetic: bool = False,
    kept: str = "",
) -> str:
    """README.md for the folder of an adapter that was not evaluated yet (`with_evaluation`).

    Args:
        config: settings of the run. Paths are left out; of a local base model the last part of its name is given, of
            one of the Hub all of it (`bases.pinned` adds the commit).
        counts: what the run was trained on, such as samples, images and labelled samples.
        data: name of what it was trained on that anybody may read.
        labels: how well its weak labels find the true regions, where these are known.
        synthetic: the data were phantom scans.
        kept: why this adapter of the run was kept, if it is not the one of the last step.
    """
    base = public_name(config.model.path)
    kind = "A3Tune" if config.adapter.kind == "a3moe" else "LoRA"
    parts = [
        "---\n" + yaml.safe_dump(_front_matter(config), sort_keys=False) + "---",
        f"# {kind} adapter for {markdown(base)}",
        _RESEARCH,
        _introduction(config, base),
        *([kept] if kept else []),
        "## How to load\n\n" + _loading(config),
        "## Training data" + (f"\n\n{markdown(data)}" if data else ""),
        _table(("What", "Number"), {name: f"{count:,}" for name, count in counts.items()}),
        f"Labels: {_SOURCES[config.labels.source]}." + (" The scans are synthetic." if synthetic else ""),
        *([_quality(labels)] if labels else []),
        f"## Results\n\n{RESULTS[0]}\n\nNot evaluated yet.\n\n{RESULTS[1]}",
        "## Settings\n\n" + _table(("Setting", "Value"), public_settings(config)),
        "## Intended use and limits\n\n" + _limits(synthetic),
    ]
    return "\n\n".join(parts) + "\n"


def with_evaluation(card: str, evaluation: Evaluation) -> str | None:
    """A card with an evaluation among its results, in place of an earlier one of the same data and decoding method.

    None unless both marks are there exactly once: else the card is not as we wrote it.
    """
    start, end = RESULTS
    head, _, rest = card.partition(start)
    written, _, tail = rest.partition(end)
    if card.count(start) != 1 or card.count(end) != 1 or end not in rest:
        return None
    entries = {entry.partition("\n")[0]: entry.strip() for entry in re.split(r"^(?=### )", written, flags=re.M)[1:]}
    heading = f"### {markdown(evaluation.data)}, {evaluation.config.evaluation.decode}"
    entries[heading] = f"{heading}\n\n{_results(evaluation)}"
    return f"{head}{start}\n\n" + "\n\n".join(entries[name] for name in sorted(entries)) + f"\n\n{end}{tail}"


def update_card(adapter: Path, evaluation: Evaluation) -> None:
    """`with_evaluation` of the card in an adapter's folder. A card that is not as we wrote it, or cannot be changed,
    stays as it is, and a warning says so; without a card nothing happens."""
    card = adapter / CARD
    if not card.is_file():
        return
    try:
        text = with_evaluation(card.read_text(encoding="utf-8"), evaluation)
        if text is None:
            logger.warning("%s: has no place for results between the two marks of a3tune eval; left as it is", card)
        else:
            write_atomic(card, text.encode())
    except (OSError, UnicodeDecodeError, OutputError) as error:
        logger.warning("%s: the results cannot be put on the model card: %s", card, error)


def merged_card(base: str, config: RunConfig | None) -> str:
    """README.md for the folder of a model with a LoRA adapter merged into it.

    Args:
        base: the base model, as `load_vlm` takes it; of a local one the last part of its name is given.
        config: settings of the adapter's run, where they are known.
    """
    name = public_name(base)
    front = {"library_name": "transformers", **_base_model(base), "pipeline_tag": "image-text-to-text"}
    front |= {"tags": ["a3tune", "lora", "medical", "vision-language"]}
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {markdown(name)} with a LoRA adapter merged",
        _RESEARCH,
        _introduction(config, name) if config else f"Base model: `{markdown(name)}`.",
        "The adapter's matrices are added to the weights of the base model, in its number format.",
    ]
    if config and config.model.quantization:
        parts.append(
            f"The adapter was trained on {config.model.quantization} weights and merged into the full ones, so answers "
            "may differ slightly from those of base and adapter in training."
        )
    parts += [
        "## How to load\n\nAny program that loads models of transformers loads this one; it needs no `a3tune`.\n\n"
        "```python\n"
        "from transformers import pipeline\n\n"
        "answer = pipeline('image-text-to-text', 'folder of this file')\n"
        "content = [{'type': 'image', 'url': 'scan.png'}, {'type': 'text', 'text': 'Is there a lesion?'}]\n"
        "print(answer(text=[{'role': 'user', 'content': content}], return_full_text=False))\n"
        "```",
        "## Limits\n\n" + _limits(False),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: RunConfig) -> dict[str, object]:
    routed = config.adapter.kind == "a3moe"
    tags = [
        "a3tune",
        "lora",
        *(["mixture-of-experts", "attention-alignment"] if routed else []),
        "medical",
        "vision-language",
    ]
    return {
        "library_name": "peft",
        **_base_model(config.model.path),
        "pipeline_tag": "image-text-to-text",
        "tags": tags,
    }


def _base_model(name: str) -> dict[str, str]:
    """Empty if it is not on the Hub: its validator refuses other names, revisions too, and a folder is private."""
    return {"base_model": name.partition("@")[0]} if is_hub_name(name) else {}


def _introduction(config: RunConfig, base: str) -> str:
    name = f"`{markdown(base)}`" if base != "tiny" else "the tiny vision-language model shipped in `a3tune`"
    adapter = config.adapter
    if adapter.kind == "lora":
        how = f"Plain LoRA of rank {adapter.rank} on all linear modules of the language model"
    else:
        how = (
            f"LoRA of rank {adapter.rank} on all linear modules of the language model, with {adapter.query_experts} "
            f"experts routed by the prompt on the queries and {adapter.key_experts} routed by image token on the keys"
        )
    alignment = config.active_alignment
    falling = " at first, falling to 0" if alignment.until else ""
    aim = f"; attention on the image was aligned to labelled regions with weight {alignment.weight:g}{falling}"
    return f"Base model: {name}. {how}{aim if alignment.weight else ''}."


def _loading(config: RunConfig) -> str:
    path = one_line(public_name(config.model.path)).replace("`", "'")
    if config.adapter.kind == "a3moe":
        first = (
            "The adapter needs the package `a3tune`: importing `a3tune.adapters` makes its type known to PEFT, which "
            "otherwise raises `KeyError: 'A3MOE'`."
        )
    else:
        first = "Plain PEFT can load this adapter too."
    return (
        f"{first}\n\n```python\n"
        "from a3tune.adapters import load_adapter\n"
        "from a3tune.vlm.load import load_vlm\n\n"
        f"vlm = load_vlm({path!r})\n"
        "model = load_adapter(vlm.model, 'folder of this file')\n"
        "```"
    ) + ("\n\nThe routed layers cannot be merged into the base model." if config.adapter.kind == "a3moe" else "")


def _quality(labels: LabelQuality) -> str:
    scores = labels.overall
    return (
        f"Of the true regions of {scores.count:,} training questions, as far as they are known, "
        f"{100 * scores.recall_at_k:.1f} % are among the best {labels.top_k} labels (intersection over union at least "
        f"{labels.iou_threshold:g}) and {100 * scores.ceiling:.1f} % among all segments; the mean best overlap is "
        f"{scores.mean_best_iou:.2f}."
    )


def _results(evaluation: Evaluation) -> str:
    settings = evaluation.config.evaluation
    names = in_order(evaluation.scores)
    main, further = ([name for name in names if describe(name).main is wanted] for wanted in (True, False))
    changed = settings.decoding | ({"strategy": settings.strategy} if settings.strategy else {})
    notes = [f"{evaluation.questions:,} questions."]
    if changed:
        notes.append(
            f"Changed settings of the method: {', '.join(f'{key}={value}' for key, value in changed.items())}."
        )
    if "coverage" in evaluation.scores:
        notes.append(f"Coverage counts attention from {settings.tau:g} on, {SCALED[settings.normalisation]}.")
        notes.append(measured_over({"": evaluation.config.active_evaluation}))
    if evaluation.hiding:
        notes.append(measured_by_hiding({"": evaluation.hiding}))
    notes.append("One training run: another seed may give other numbers.")
    parts = [_scores(evaluation, main), markdown(" ".join(notes))]
    if further:
        parts += ["<details><summary>Further scores</summary>", _scores(evaluation, further), "</details>"]
    return "\n\n".join(parts)


def _scores(evaluation: Evaluation, names: Sequence[str]) -> str:
    def shown(name: str, estimate: Estimate) -> str:
        return f"{number(estimate.mean, name)} {typographic(interval_text(describe(name), estimate))}"

    rows = {describe(name).heading: shown(name, evaluation.scores[name]) for name in names}
    return _table(("Metric", "Mean [95 % interval]"), rows)


def _limits(synthetic: bool) -> str:
    limits = [
        "Research on how vision-language models look at images; no clinical use, and no decision about a patient.",
        "Attention on a region does not prove that the answer rests on it.",
        "Answers must be checked, and none trusted on other kinds of images and questions than it was trained on.",
    ]
    if synthetic:
        limits.append("Trained on drawn scans: it knows nothing about real ones.")
    return "\n".join(f"- {limit}" for limit in limits)


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | ---: |"]
    return "\n".join(lines + [f"| {markdown(key)} | {markdown(value)} |" for key, value in rows.items()])
