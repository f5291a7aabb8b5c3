"""The model card: valid front matter, loadable, nothing of the machine in it."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from a3tune.config import AdapterConfig, DataConfig, EvaluationConfig, LabelsConfig, ModelConfig, RunConfig
from a3tune.data.public import public_data
from a3tune.metrics.stats import Estimate
from a3tune.report.card import RESULTS, Evaluation, model_card, update_card, with_evaluation
from a3tune.report.records import LabelQuality, LabelScores
from a3tune.types import Sample

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


def _evaluation(data: str = "SLAKE", decode: str = "greedy", recall: float = 0.684, **settings: object) -> Evaluation:
    scores = {"open_recall": Estimate(recall, 0.66, 0.7, 800), "intensity": Estimate(0.33, 0.32, 0.34, 800)}
    config = replace(RunConfig(), evaluation=EvaluationConfig(decode=decode, **settings))
    return Evaluation(data, 1061, config, scores | {"recall_all_heads": Estimate(0.1, 0.1, 0.1, 1)})


def _evaluated(card: str, *evaluations: Evaluation) -> str:
    for evaluation in evaluations:
        card = with_evaluation(card, evaluation) or pytest.fail("no place for results")
    return card


def test_an_evaluation_fills_the_results() -> None:
    text = _evaluated(model_card(RunConfig(), {}), _evaluation())
    assert "### SLAKE, greedy\n" in text and "1,061 questions." in text and "Not evaluated yet" not in text
    assert "| Open recall, % | 68.4 [66.0, 70.0] |" in text and "| Intensity | 0.330 [0.320, 0.340] |" in text
    assert "all_heads" not in text and "another seed" in text
    assert "Not evaluated yet" in model_card(RunConfig(), {})
    assert ModelCard(text).data.to_dict()["library_name"] == "peft"


def test_evaluations_stand_side_by_side_and_a_new_one_takes_the_place_of_its_elder() -> None:
    card = model_card(RunConfig(), {})
    both = _evaluated(card, _evaluation(decode="vcd", decoding={"alpha": 0.5}), _evaluation(), _evaluation("VQA-RAD"))
    assert [line for line in both.splitlines() if line.startswith("### ")] == [
        "### SLAKE, greedy",
        "### SLAKE, vcd",
        "### VQA-RAD, greedy",
    ]
    assert "Changed settings of the method: alpha=0.5." in both
    again = _evaluated(both, _evaluation(recall=0.5))
    assert again == both.replace("68.4", "50.0", 1)
    assert _evaluated(again, _evaluation(recall=0.5)) == again


def test_what_a_user_wrote_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = model_card(RunConfig(), {}).replace("library_name: peft", "license: mit\nlibrary_name: peft")
    mine = mine.replace("# A3Tune adapter", "# Our adapter") + "\n## Thanks\n\n### To everybody\n"
    (tmp_path / "README.md").write_text(mine)
    update_card(tmp_path, _evaluation())
    card = (tmp_path / "README.md").read_text()
    start, end = (mine.index(mark) for mark in RESULTS)
    assert card.startswith(mine[:start]) and card.endswith(mine[end:]) and "68.4" in card
    assert not caplog.messages


@pytest.mark.parametrize("spoil", ["start", "end", "twice", "swapped", "bytes"])
def test_a_card_that_is_not_as_we_wrote_it_is_left_alone(
    spoil: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text, (start, end) = model_card(RunConfig(), {}), RESULTS
    spoilt = {
        "start": text.replace(start, ""),
        "end": text.replace(end, ""),
        "twice": text + text,
        "swapped": text.replace(start, "?").replace(end, start).replace("?", end),
        "bytes": text,
    }[spoil].encode() + (b"\xff" if spoil == "bytes" else b"")
    (tmp_path / "README.md").write_bytes(spoilt)
    update_card(tmp_path, _evaluation())
    assert (tmp_path / "README.md").read_bytes() == spoilt
    assert "README.md" in caplog.text


def test_without_a_card_nothing_happens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    update_card(tmp_path, _evaluation())
    assert list(tmp_path.iterdir()) == [] and not caplog.messages


def test_data_have_a_name_that_tells_no_place() -> None:
    samples = [Sample("1", Path(f"{SECRET}/a.png"), "Where?", "liver", "open")]
    assert public_data(Path("data/slake/test.jsonl"), samples) == "SLAKE"
    name = public_data(Path(f"{SECRET}/test.jsonl"), samples)
    assert name == public_data(Path("elsewhere/rows.jsonl"), samples) and "ward" not in name
    assert name != public_data(Path("elsewhere/rows.jsonl"), [replace(samples[0], answer="lung")])


def test_says_how_good_its_labels_are() -> None:
    quality = LabelQuality(4, 0.5, LabelScores(0.31, 0.42, 0.66, 120))
    text = model_card(RunConfig(), {"questions": 300}, data="SLAKE", labels=quality)
    assert "## Training data\n\nSLAKE\n" in text
    assert "Of the true regions of 120 training questions" in text and "31.0 %" in text and "66.0 %" in text


def test_no_paths_of_the_machine() -> None:
    config = RunConfig(
        model=ModelConfig(path=f"{SECRET}/base"),
        data=DataConfig(Path(f"{SECRET}/a.jsonl"), Path(f"{SECRET}/b.jsonl"), Path(f"{SECRET}/c.jsonl")),
        labels=LabelsConfig(store=Path(f"{SECRET}/store"), ranker=f"{SECRET}/ranker"),
        evaluation=EvaluationConfig(weights={"bertscore": f"{SECRET}/roberta"}),
        output=Path(f"{SECRET}/out"),
    )
    text = model_card(config, {"samples": 3})
    assert "jane.doe" not in text and "ward-7" not in text and "jsonl" not in text


def test_text_of_a_user_breaks_nothing() -> None:
    config = replace(RunConfig(), labels=LabelsConfig(query="a | b <script>\n# Title\n---"))
    text = model_card(config, {"<b>x</b>": 1})
    assert "<script>" not in text and "<b>" not in text and "\n# Title" not in text
    assert "a \\| b" in text
