"""The model card: valid front matter, text that breaks nothing, nothing of the machine in it, programs that run."""

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import PeftModel
from PIL import Image

from a3tune.adapters import add_adapter
from a3tune.commands.merge import merge_adapter
from a3tune.config import AdapterConfig, DataConfig, EvaluationConfig, LabelsConfig, ModelConfig, RunConfig
from a3tune.data.public import public_data
from a3tune.metrics.stats import Estimate
from a3tune.report.card import RESULTS, Evaluation, model_card, update_card, with_evaluation
from a3tune.report.records import LabelQuality, LabelScores
from a3tune.types import Sample
from a3tune.vlm.load import load_vlm

SECRET = "/home/jane.doe/ward-7"


@dataclass
class Section:
    """What stands under one heading of a card, up to the next."""

    text: str = ""
    rows: dict[str, str] = field(default_factory=dict)
    """First cell of a table's rows -> second."""
    programs: list[str] = field(default_factory=list)
    """Blocks of Python."""


def _front(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def _sections(card: str) -> dict[str, Section]:
    """A card as a reader of Markdown sees it, by heading; "" is what stands above the first one."""
    found = {"": Section()}
    cells: list[str] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    for before, token in zip([None, *tokens], tokens, strict=False):
        section = list(found.values())[-1]
        if token.type == "fence" and token.info == "python":
            section.programs.append(token.content)
        elif token.type == "tr_open":
            cells = []
        elif token.type == "tr_close":
            section.rows |= dict([cells])
        elif token.type == "inline" and before is not None:
            text = "".join(child.content for child in token.children or ())
            if before.type == "heading_open":
                assert text not in found
                found[text] = Section()
            elif before.type in ("td_open", "th_open"):
                cells.append(text)
            else:
                section.text += f"{text}\n"
    return found


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


def test_says_what_it_was_made_of_and_what_it_is_not() -> None:
    card = _sections(model_card(RunConfig(), {"samples": 3000}))
    assert "not a medical device" in card["A3Tune adapter for tiny"].text
    assert card["Training data"].rows["samples"] == "3,000" and "weak labels" in card["Training data"].text
    assert card["Settings"].rows["labels.top_k"] == "4"
    assert card["Intended use and limits"].text
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
    bare = model_card(RunConfig(), {})
    text = _evaluated(bare, _evaluation())
    found = _sections(text)["SLAKE, greedy"]
    assert "1,061" in found.text
    assert found.rows["Open recall, %"] == "68.4 [66.0, 70.0]" and found.rows["Intensity"] == "0.330 [0.320, 0.340]"
    assert _sections(bare)["Results"].text and not _sections(text)["Results"].text
    assert ModelCard(text).data.to_dict()["library_name"] == "peft"


def test_no_score_is_dropped_and_further_ones_are_folded() -> None:
    text = _evaluated(model_card(RunConfig(), {}), _evaluation())
    main, _, folded = text.partition("<details>")
    assert "recall_all_heads" not in main and "recall_all_heads" in folded.partition("</details>")[0]
    assert _sections(text)["SLAKE, greedy"].rows["recall_all_heads"] == "0.100 [0.100, 0.100]"
    only = replace(_evaluation(), scores={"open_recall": Estimate(0.5, 0.4, 0.6, 9)})
    assert "<details>" not in _evaluated(model_card(RunConfig(), {}), only)


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
    name = public_data(samples)
    assert name == public_data([replace(samples[0], image=Path("elsewhere/a.png"))]) and "ward" not in name
    assert name != public_data([replace(samples[0], answer="lung")])


def test_data_are_a_published_set_by_their_rows_not_by_their_folder() -> None:
    rows = [Sample(name, Path("slake/a.png"), "Where?", "liver", "open") for name in ("slake-1", "slake-2")]
    assert public_data(rows).startswith("SLAKE (hash ")
    assert public_data([*rows, replace(rows[0], id="mine-1")]).startswith("Own questions (hash ")
    assert public_data([replace(rows[0], id="iu-xray-vqa-3")]).startswith("IU-Xray VQA (CARES) (hash ")
    assert public_data([replace(rows[0], id="iu-xray-CXR1_IM-1")]).startswith("IU-Xray reports (hash ")


def test_says_how_good_its_labels_are() -> None:
    quality = LabelQuality(4, 0.5, LabelScores(0.31, 0.42, 0.66, 120))
    text = model_card(RunConfig(), {"questions": 300}, data="SLAKE", labels=quality)
    found = _sections(text)["Training data"].text
    assert found.startswith("SLAKE\n") and all(number in found for number in ("120", "31.0 %", "66.0 %", "0.42"))


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
    assert "<script>" not in text and "<b>" not in text and "Title" not in _sections(text)
    assert _sections(text)["Settings"].rows["labels.query"].startswith("a | b ")


# The programs that cards show


def _save_adapter(vlm_folder: Path, folder: Path, kind: Literal["a3moe", "lora"]) -> dict[str, torch.Tensor]:
    """An adapter that changes the model, saved; returns its weights."""
    settings = AdapterConfig(kind, rank=2, expert_rank=2, query_experts=2, key_experts=2)
    model = add_adapter(load_vlm(vlm_folder).model, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.save_pretrained(str(folder))
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _run_program(card: str, heading: str, **places: Path) -> dict[str, Any]:
    """Runs the one program under a heading, with our places for its placeholders; returns its names."""
    (program,) = _sections(card)[heading].programs
    for placeholder, place in places.items():
        quoted = repr(placeholder.replace("_", " "))
        assert quoted in program
        program = program.replace(quoted, repr(str(place)))
    names: dict[str, Any] = {}
    exec(compile(program, heading, "exec"), names)
    return names


@pytest.mark.parametrize("kind", ["a3moe", "lora"])
def test_the_program_of_a_card_loads_the_adapter(
    kind: Literal["a3moe", "lora"], vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = _save_adapter(vlm_folder, tmp_path / "adapter", kind)
    config = replace(RunConfig(), adapter=AdapterConfig(kind=kind), model=ModelConfig(path=str(vlm_folder)))
    monkeypatch.chdir(vlm_folder.parent)  # the card names the last part of a base model's folder
    model = _run_program(model_card(config, {}), "How to load", folder_of_this_file=tmp_path / "adapter")["model"]
    assert model.peft_config["default"].peft_type == {"a3moe": "A3MOE", "lora": "LORA"}[kind]
    loaded = dict(model.named_parameters())
    assert weights and all(torch.equal(loaded[name], value) for name, value in weights.items())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what PEFT asks it
def test_plain_peft_loads_a_lora_adapter_too(vlm_folder: Path, tmp_path: Path) -> None:
    weights = _save_adapter(vlm_folder, tmp_path, "lora")
    loaded = dict(PeftModel.from_pretrained(load_vlm(vlm_folder).model, tmp_path).named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_importing_the_adapters_is_what_makes_a_routed_one_known(vlm_folder: Path, tmp_path: Path) -> None:
    _save_adapter(vlm_folder, tmp_path, "a3moe")
    program = """
import sys
import a3tune
from peft import PeftConfig
try:
    PeftConfig.from_pretrained(sys.argv[1])
except KeyError as error:
    print(error)
import a3tune.adapters
print(PeftConfig.from_pretrained(sys.argv[1]).peft_type)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["'A3MOE'", "A3MOE"]
    said = _sections(model_card(RunConfig(), {}))["How to load"].text
    assert "importing a3tune.adapters" in said and "KeyError: 'A3MOE'" in said


def test_the_program_of_a_merged_models_card_answers(
    vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _save_adapter(vlm_folder, tmp_path / "adapter", "lora")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=str(vlm_folder)).folder
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "scan.png")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    _run_program((merged / "README.md").read_text(), "How to load", folder_of_this_file=merged)
    assert "generated_text" in capsys.readouterr().out
