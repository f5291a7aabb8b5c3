"""The model card: valid front matter, loadable, nothing of the machine in it."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from a3tune.config import AdapterConfig, DataConfig, LabelsConfig, ModelConfig, RunConfig
from a3tune.metrics.stats import Estimate
from a3tune.report.card import model_card

SECRET = "/home/jane.doe/ward-7"


def _front(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_front_matter_is_what_the_hub_reads() -> None:
    config = replace(RunConfig(), model=ModelConfig(path="acme/llava-med"))
    text = model_card(config, {"samples": 3000})
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "acme/llava-med"
    assert data["library_name"] == "peft"
    assert "a3tune" in data["tags"] and "license" not in data


@pytest.mark.parametrize("path", ["tiny", "/models/llava", "./llava", "~/llava", "a/b/c"])
def test_only_a_hub_name_is_a_base_model(path: str) -> None:
    text = model_card(replace(RunConfig(), model=ModelConfig(path=path)), {})
    assert "base_model" not in _front(text)
    assert Path(path).name in text


def test_says_how_to_load_and_what_it_is_not() -> None:
    text = model_card(RunConfig(), {"samples": 3})
    assert "import a3tune" in text and "KeyError: 'A3MOE'" in text
    assert "not a medical device" in text and "Research" in text
    assert "| samples | 3 |" in text and "weak labels" in text
    plain = model_card(replace(RunConfig(), adapter=AdapterConfig(kind="lora")), {})
    assert "A3MOE" not in plain and "mixture-of-experts" not in _front(plain)["tags"]


def test_shows_metrics_with_intervals() -> None:
    scores = {"open_recall": Estimate(0.684, 0.66, 0.7, 800), "intensity": Estimate(0.33, 0.32, 0.34, 800)}
    text = model_card(RunConfig(), {}, scores=scores)
    assert "| Open recall, % | 68.4 [66.0, 70.0] |" in text and "| Intensity | 0.330 [0.320, 0.340] |" in text
    assert "## Results" not in model_card(RunConfig(), {})


def test_no_paths_of_the_machine() -> None:
    config = RunConfig(
        model=ModelConfig(path=f"{SECRET}/base"),
        data=DataConfig(Path(f"{SECRET}/a.jsonl"), Path(f"{SECRET}/b.jsonl"), Path(f"{SECRET}/c.jsonl")),
        labels=LabelsConfig(store=Path(f"{SECRET}/store"), ranker=f"{SECRET}/ranker"),
        output=Path(f"{SECRET}/out"),
    )
    text = model_card(config, {"samples": 3})
    assert "jane.doe" not in text and "ward-7" not in text and "jsonl" not in text


def test_text_of_a_user_breaks_nothing() -> None:
    config = replace(RunConfig(), labels=LabelsConfig(query="a | b <script>\n# Title\n---"))
    text = model_card(config, {"<b>x</b>": 1})
    assert "<script>" not in text and "<b>" not in text and "\n# Title" not in text
    assert "a \\| b" in text
