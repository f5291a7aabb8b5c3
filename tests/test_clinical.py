"""BERTScore, CheXbert similarity, RadGraph F1, RaTEScore: on tiny random models and stand-ins for packages."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    RobertaTokenizer,
)

from a3tune.errors import ModelError
from a3tune.metrics.bertscore import LAYER, bert_score, greedy_f1
from a3tune.metrics.chexbert import chexbert
from a3tune.metrics.radgraph import combined_f1, package_f1, radgraph
from a3tune.metrics.ratescore import ratescore
from a3tune.metrics.text import Scores, Texts

SAID = ["The heart is normal.", "No effusion is seen, heart and lungs are clear.", "", "Легкие чистые", "heart " * 600]
TRUTH = ["The heart is enlarged.", "Clear lungs.", "The heart is normal.", "The lungs are clear.", "lungs " * 20_000]
SHAPE = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def roberta_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta")
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator([*SAID[:2], *TRUTH[:2]], vocab_size=300, min_frequency=1, special_tokens=special)
    trained.save_model(str(folder))
    RobertaTokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=300, num_hidden_layers=LAYER + 1, max_position_embeddings=514, initializer_range=0.2, **SHAPE
    )
    # As roberta-large is published: with the head of its training.
    RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chexbert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chexbert")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the heart is normal enlarged no effusion seen lungs are clear and , ."
    (folder / "vocab.txt").write_text(words.replace(" ", "\n"))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=19, num_hidden_layers=2, initializer_range=0.7, **SHAPE)
    config.save_pretrained(folder)
    state = {f"module.bert.{name}": value for name, value in BertModel(config).state_dict().items()}
    state |= {
        "module.linear_heads.0.weight": torch.zeros(4, 8),
        "module.bert.embeddings.position_ids": torch.arange(512),
    }
    torch.save({"epoch": 3, "model_state_dict": state}, folder / "chexbert.pth")
    return folder


def test_bertscore_is_that_of_the_17th_layer_by_hand(roberta_folder):
    tokenizer = RobertaTokenizer.from_pretrained(roberta_folder, add_prefix_space=True)
    model = RobertaModel.from_pretrained(roberta_folder, add_pooling_layer=False).eval()

    def tokens(text):
        ids = tokenizer(text.strip(), return_tensors="pt", truncation=True, max_length=512)["input_ids"]
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[17][0]
        return hidden / hidden.norm(dim=1, keepdim=True)

    def best(own, others):
        # Start and end are no words of the text, but may be what a word is nearest to.
        return sum(max(float(word @ other) for other in others) for word in own[1:-1]) / (len(own) - 2)

    for said, truth, score in zip(SAID, TRUTH, bert_score(SAID, TRUTH, roberta_folder)["bertscore"], strict=True):
        if not said:
            assert score == 0
            continue
        a, b = tokens(said), tokens(truth)
        precision, recall = best(a, b), best(b, a)
        assert score == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)


def test_greedy_matching_by_hand():
    along, across, between = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.6, 0.8])
    said, truth = torch.stack([along, across, along])[None], torch.stack([between, along, across])[None]
    roles = torch.tensor([[1, 2, 0]]), torch.tensor([[2, 0, 1]])
    # Precision: "across" finds the end of the other side. Recall: "between" has .6 with the start, .8 with "across".
    assert greedy_f1(said, roles[0], truth, roles[1]).item() == pytest.approx(2 * 1.0 * 0.8 / 1.8)


def test_chexbert_is_the_cosine_of_the_first_embeddings(chexbert_folder):
    tokenizer = BertTokenizer.from_pretrained(chexbert_folder)
    model = BertModel(BertConfig.from_pretrained(chexbert_folder)).eval()
    state = torch.load(chexbert_folder / "chexbert.pth", weights_only=True)["model_state_dict"]  # noqa: TID251
    model.load_state_dict({name[12:]: value for name, value in state.items() if name[12:] in model.state_dict()})

    @torch.no_grad()
    def first(text):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"]
        return model(ids).last_hidden_state[0, 0]

    found = chexbert(["The  heart\n is normal. ", *SAID[1:]], TRUTH, chexbert_folder)["chexbert"]
    for said, truth, score in zip(SAID, TRUTH, found, strict=True):
        a, b = first(said), first(truth)
        assert score == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-5)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(("metric", "folder"), [(bert_score, "roberta_folder"), (chexbert, "chexbert_folder")])
def test_identical_reports_score_best_in_any_order(metric, folder, request):
    folder = request.getfixturevalue(folder)
    texts = [text for text in SAID if text]
    ((same,), (forth,), (back,)) = (
        metric(*pair, folder).values() for pair in ((texts, texts), (SAID, TRUTH), (SAID[::-1], TRUTH[::-1]))
    )
    assert same == pytest.approx([1.0] * len(texts), abs=1e-5)
    assert all(score < 1 + 1e-5 for score in forth) and min(forth) < 0.99
    # Padding is another, which only touches the last digits.
    assert forth == pytest.approx(back[::-1], abs=1e-5)
    assert list(metric([], [], folder).values()) == [[]]


@pytest.mark.parametrize(
    ("metric", "needed", "names"),
    [
        (bert_score, ["config.json", "model.safetensors"], "FacebookAI/roberta-large"),
        (chexbert, ["config.json", "chexbert.pth"], "StanfordAIMI/RRG_scorers"),
        (radgraph, ["radgraph/config.json", "radgraph/weights.th"], "pip install radgraph"),
        (ratescore, ["Angelakeke/RaTE-NER-Deberta/config.json"], "pip install RaTEScore"),
    ],
)
def test_what_is_absent_says_how_to_get_it(
    metric: Callable[[Texts, Texts, Path | None], Scores], needed, names, tmp_path
):
    with pytest.raises(ModelError, match=names):
        metric(["a"], ["a"], None)
    with pytest.raises(ModelError, match=f"missing: .*{needed[-1]}.*{names}"):
        metric(["a"], ["a"], tmp_path)
    for file in needed:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("damaged")
    with pytest.raises(ModelError, match=str(tmp_path)):
        metric(["a"], ["a"], tmp_path)


def test_weights_of_something_else_are_refused(roberta_folder, chexbert_folder, tmp_path):
    for file in (*chexbert_folder.iterdir(), *roberta_folder.glob("model.*")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({"model_state_dict": {"module.bert.embeddings.word_embeddings.weight": torch.zeros(3)}}, tmp_path / "x")
    (tmp_path / "chexbert.pth").write_bytes((tmp_path / "x").read_bytes())
    with pytest.raises(ModelError, match=r"CheXbert.*size mismatch"):
        chexbert(["a"], ["a"], tmp_path)
    torch.save({"model_state_dict": {"module.bert.embeddings.other": torch.zeros(3)}}, tmp_path / "chexbert.pth")
    with pytest.raises(ModelError, match=r"chexbert\.pth"):
        chexbert(["a"], ["a"], tmp_path)
    with pytest.raises(ModelError, match="17 layers"):
        bert_score(["a"], ["a"], tmp_path)


def annotation(*entities: tuple[str, str, list[tuple[str, int]]]):
    return {
        "entities": {
            str(index): {
                "tokens": tokens,
                "label": label,
                "relations": [[kind, str(other)] for kind, other in relations],
            }
            for index, (tokens, label, relations) in enumerate(entities)
        }
    }


# "no evidence of acute cardiopulmonary process": annotation in the package's own tests.
PROCESS = annotation(
    ("acute", "OBS-DA", []), ("cardiopulmonary", "ANAT-DP", []), ("process", "OBS-DA", [("located_at", 1)])
)
OTHER = annotation(("acute", "OBS-DA", []), ("pulmonary", "ANAT-DP", []), ("process", "OBS-DA", [("located_at", 1)]))
ALONE = annotation(("process", "OBS-DA", []), ("hernia", "OBS-DP", []))
NOTHING = annotation()


def test_radgraph_by_hand():
    # 2 of 3 entities; the relation has another object.
    assert combined_f1(PROCESS, OTHER) == pytest.approx((2 / 3 + 0) / 2)
    assert package_f1(PROCESS, OTHER) == pytest.approx({"simple": 2 / 3, "partial": 2 / 3, "complete": 1 / 3})
    # 1 of 3 and 2 entities: 2 * 1 / 5; with a relation there, without here.
    assert combined_f1(PROCESS, ALONE) == pytest.approx((2 / 5) / 2)
    assert package_f1(PROCESS, ALONE) == pytest.approx({"simple": 2 / 5, "partial": 0.0, "complete": 0.0})
    # The same words with another label are another entity.
    absent = annotation(("hernia", "OBS-DA", []))
    assert combined_f1(absent, ALONE) == 0
    assert combined_f1(PROCESS, PROCESS) == 1
    # No relations: their F1 is undefined, so 0, as published.
    assert combined_f1(ALONE, ALONE) == 0.5
    assert set(package_f1(ALONE, ALONE).values()) == {1.0}
    for other in (NOTHING, PROCESS):
        assert combined_f1(NOTHING, other) == 0
        assert set(package_f1(NOTHING, other).values()) == {0.0}
    # Only `complete` ignores case, and only of entities in a relation.
    upper = annotation(
        ("acute", "OBS-DA", []), ("Cardiopulmonary", "ANAT-DP", []), ("Process", "OBS-DA", [("located_at", 1)])
    )
    assert package_f1(PROCESS, upper)["simple"] == pytest.approx(1 / 3)
    assert package_f1(PROCESS, upper)["complete"] == pytest.approx(2 / 3)


ENTITIES = st.lists(
    st.tuples(
        st.sampled_from(["heart", "lung"]),
        st.sampled_from(["ANAT-DP", "OBS-DA"]),
        st.lists(st.tuples(st.sampled_from(["modify", "located_at"]), st.just(0)), max_size=2),
    ),
    max_size=4,
).map(lambda entities: annotation(*entities))


@given(ENTITIES, ENTITIES)
def test_radgraph_properties(said, truth):
    for score in (combined_f1, lambda *pair: package_f1(*pair)["complete"]):
        assert 0 <= score(said, truth) <= 1
        assert score(said, truth) == score(truth, said)
        assert score(said, truth) <= score(truth, truth) + 1e-12
    levels = package_f1(said, said)
    assert set(levels.values()) == ({1.0} if said["entities"] else {0.0})


RADGRAPH = """
class RadGraph:
    def __init__(self, model_type, model_cache_dir):
        assert model_type == "radgraph" and open(model_cache_dir + "/radgraph/config.json").read() == "here"
        print("Using device: cpu")
    def __call__(self, reports):
        assert all(len(report.split()) <= 512 for report in reports)
        words = [report.split() for report in reports]
        return {str(i): {"entities": {str(j): {"tokens": word, "label": "OBS-DP", "relations": []}
                for j, word in enumerate(report)}} for i, report in enumerate(words)}
"""
RATESCORE = """
class RaTEScore:
    def __init__(self, use_gpu):
        assert open("Angelakeke/RaTE-NER-Deberta/config.json").read() == "here"
    def compute_score(self, predictions, references):
        return [float(said == truth) for said, truth in zip(predictions, references)]
"""


def test_packages_run_in_a_process_of_their_own(tmp_path, monkeypatch):
    """Stand-ins for the packages: what they are given, what is made of their answer, and how a failure is told."""
    packages = tmp_path / "packages"
    (packages / "RaTEScore").mkdir(parents=True)
    (packages / "radgraph.py").write_text(RADGRAPH)
    (packages / "RaTEScore" / "__init__.py").write_text(RATESCORE)
    (packages / "RaTEScore" / "utils.py").write_text("def sentence_split(texts): return [t for t in texts if t], []")
    files = ["radgraph/config.json", "radgraph/weights.th", "Angelakeke/RaTE-NER-Deberta/config.json"]
    for file in (*files, "FremyCompany/BioLORD-2023-C/config.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("here")
    with pytest.raises(ModelError, match=f"{sys.executable} failed: ModuleNotFoundError: .*radgraph.*pip install"):
        radgraph(["a"], ["a"], tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    found = radgraph(["clear lungs", "Herz frei", "x " * 20_000], ["clear heart", "Herz  frei", ""], tmp_path)
    assert found == {
        "radgraph": [0.25, 0.5, 0.0],
        "radgraph_simple": [0.5, 1.0, 0.0],
        "radgraph_partial": [0.5, 1.0, 0.0],
        "radgraph_complete": [0.5, 1.0, 0.0],
    }
    assert ratescore(["a", "b", ""], ["a", "c", "d"], tmp_path) == {"ratescore": [1.0, 0.0, 0.5]}
    (packages / "radgraph.py").write_text(RADGRAPH.replace("<= 512", "<= 1"))
    with pytest.raises(ModelError, match="AssertionError"):
        radgraph(["clear lungs"], ["clear heart"], tmp_path)
    own = tmp_path / "venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.write_text("#!/bin/sh\necho own environment >&2; exit 3\n")
    own.chmod(0o755)
    with pytest.raises(ModelError, match="venv/bin/python failed: own environment"):
        ratescore(["a"], ["a"], tmp_path)
