"""The model card beside an adapter: README.md, Markdown with the front matter of the Hugging Face Hub.

Knows settings and numbers; nothing of the machine or the patients behind them.
"""

from collections.abc import Mapping

import yaml

from a3tune.config import RunConfig
from a3tune.metrics.stats import Estimate
from a3tune.report.data import METRICS, is_hub_name, public_name, public_settings
from a3tune.report.escape import markdown, one_line
from a3tune.report.summary import number

_SOURCES = {
    "weak": "weak labels: segments proposed in each image and ranked by the prompt, without annotation",
    "truth": "the data set's own regions of interest",
    "none": "none: trained on answers alone",
}


def model_card(
    config: RunConfig,
    counts: Mapping[str, int],
    *,
    scores: Mapping[str, Estimate] | None = None,
    synthetic: bool = False,
) -> str:
    """README.md for the folder of an adapter.

    Args:
        config: settings of the run. Paths are left out; of a local base model the last part of its name is given.
        counts: what the run was trained on, such as samples, images and labelled samples.
        scores: metrics of `report.data.METRICS` on test data, if there was an evaluation.
        synthetic: the data were phantom scans.
    """
    base = public_name(config.model.path)
    kind = "A3Tune" if config.adapter.kind == "a3moe" else "LoRA"
    parts = [
        "---\n" + yaml.safe_dump(_front_matter(config), sort_keys=False) + "---",
        f"# {kind} adapter for {markdown(base)}",
        "Research only. This is **not a medical device**: no one may be diagnosed or treated by its answers.",
        _introduction(config, base),
        "## How to load\n\n" + _loading(config),
        "## Training data\n\n" + _table(("What", "Number"), {name: f"{count:,}" for name, count in counts.items()}),
        f"Labels: {_SOURCES[config.labels.source]}." + (" The scans are synthetic." if synthetic else ""),
    ]
    if scores:
        parts.append("## Results\n\n" + _results(scores))
        parts.append(
            f"Coverage counts attention from {config.evaluation.tau:g} on; maps normalised by "
            f"`{config.evaluation.normalisation}`. One training run: another seed may give other numbers."
        )
    parts += [
        "## Settings\n\n" + _table(("Setting", "Value"), public_settings(config)),
        "## Limits\n\n" + _limits(synthetic),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: RunConfig) -> dict[str, object]:
    """Without `base_model` if it is not on the Hub: its validator refuses other names, and a folder is private."""
    routed = config.adapter.kind == "a3moe"
    known = {"base_model": config.model.path} if is_hub_name(config.model.path) else {}
    tags = [
        "a3tune",
        "lora",
        *(["mixture-of-experts", "attention-alignment"] if routed else []),
        "medical",
        "vision-language",
    ]
    return {"library_name": "peft", **known, "pipeline_tag": "image-text-to-text", "tags": tags}


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
    aligned = config.alignment.weight > 0 and config.labels.source != "none"
    aim = (
        f"; attention on the image was aligned to labelled regions with weight {config.alignment.weight:g}"
        if aligned
        else ""
    )
    return f"Base model: {name}. {how}{aim}."


def _loading(config: RunConfig) -> str:
    path = one_line(public_name(config.model.path)).replace("`", "'")
    if config.adapter.kind == "a3moe":
        first = "`import a3tune` first: it makes the adapter type known. Without it PEFT raises `KeyError: 'A3MOE'`."
    else:
        first = "Plain PEFT can load this adapter too."
    return (
        f"{first}\n\n```python\n"
        "import a3tune  # before PEFT loads the adapter\n"
        "from a3tune.adapters import load_adapter\n"
        "from a3tune.vlm.load import load_vlm\n\n"
        f"vlm = load_vlm({path!r})\n"
        "model = load_adapter(vlm.model, 'folder of this file')\n"
        "```"
    ) + ("\n\nThe routed layers cannot be merged into the base model." if config.adapter.kind == "a3moe" else "")


def _results(scores: Mapping[str, Estimate]) -> str:
    rows = {
        METRICS[name].title + (", %" if METRICS[name].percent else ""): (
            f"{number(e.mean, name)} [{number(e.low, name)}, {number(e.high, name)}]"
        )
        for name, e in scores.items()
        if name in METRICS
    }
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
