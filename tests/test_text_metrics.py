import random
import subprocess
import sys
import time
from pathlib import Path

import nltk
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer

from a3tune.metrics.text import bleu, longest_common_subsequence, meteor, rouge_l

SAID = [
    "The heart is enlarged. There is no pleural effusion.",
    "Dr. Ray sees a small leak on the left",
    "Der linke Lungenflügel ist frei.",
    "Normal",
    "",
    "肺野清晰。",
    "Clear lungs, clear heart; 2.5 cm nodule (left).",
]
TRUTH = [
    "Heart size is enlarged. No effusions are seen.",
    "There is a small effusion on the left side. Dr. Ray was told.",
    "The left lung is clear.",
    "Normal chest.",
    "The lungs are clear.",
    "The lungs are clear.",
    "",
]


def write_nltk_data(folder: Path) -> Path:
    """`punkt_tab` that knows the abbreviation "dr", and a `wordnet` in which flow and leak are synonyms."""
    punkt = folder / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (punkt / name).write_text("")
    (punkt / "abbrev_types.txt").write_text("dr\n")
    wordnet = folder / "corpora" / "wordnet"
    wordnet.mkdir(parents=True)
    header = "  1 WordNet 3.0 Copyright 2006 by Princeton University.\n"
    for part in ("noun", "verb", "adj", "adv"):
        for name in (f"data.{part}", f"index.{part}"):
            (wordnet / name).write_text(header)
        (wordnet / f"{part}.exc").write_text("")
    for name in ("cntlist.rev", "index.sense"):
        (wordnet / name).write_text("")
    (wordnet / "lexnames").write_text("".join(f"{i:02d}\tname{i}\t1\n" for i in range(45)))
    at = f"{len(header):08d}"
    (wordnet / "data.noun").write_text(f"{header}{at} 11 n 02 flow 0 leak 0 000 | liquid  \n")
    (wordnet / "index.noun").write_text(header + "".join(f"{word} n 1 0 1 0 {at}  \n" for word in ("flow", "leak")))
    return folder


@pytest.fixture(scope="module")
def nltk_data(tmp_path_factory):
    folder = write_nltk_data(tmp_path_factory.mktemp("nltk"))
    bleu(["a"], ["a"], folder)
    return folder


def test_equal_to_the_packages(nltk_data):
    words = [(nltk.word_tokenize(said), nltk.word_tokenize(truth)) for said, truth in zip(SAID, TRUTH, strict=True)]
    assert words[1][0][:2] == ["Dr.", "Ray"] and words[0][0].count(".") == 2
    smoothing = SmoothingFunction().method4
    expected = [sentence_bleu([truth], said, smoothing_function=smoothing) for said, truth in words]
    assert bleu(SAID, TRUTH, nltk_data)["bleu"] == expected
    assert meteor(SAID, TRUTH, nltk_data)["meteor"] == [meteor_score([truth], said) for said, truth in words]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [scorer.score(truth, said)["rougeL"].fmeasure for said, truth in zip(SAID, TRUTH, strict=True)]
    assert rouge_l(SAID, TRUTH)["rouge_l"] == pytest.approx(expected)
    assert expected[0] > 0 and expected[4] == expected[5] == expected[6] == 0


def test_by_hand(nltk_data):
    # Precisions 4/5, 3/4, 2/3, 1/2 of 1 to 4 words; their product is 1/5.
    assert bleu(["heart lungs ribs spine clear"], ["heart lungs ribs spine normal"], nltk_data)[
        "bleu"
    ] == pytest.approx([0.2**0.25])
    # Half as long as the reference, all n-grams right: only the brevity penalty exp(1 - 8/4).
    found = bleu(["a b c d"], ["a b c d e f g h"], nltk_data)["bleu"]
    assert found == pytest.approx([2.718281828**-1])
    # The example of rouge_score's README.
    quick = rouge_l(["The quick brown dog jumps on the log."], ["The quick brown fox jumps over the lazy dog"])
    assert quick["rouge_l"] == pytest.approx([0.5882352941176471])
    assert rouge_l(["effusions"], ["effusion"])["rouge_l"] == [1.0]


def test_meteor_counts_stems_and_synonyms(nltk_data):
    # The example of nltk's documentation.
    said = "It is a guide to action which ensures that the military always obeys the commands of the party"
    truth = "It is a guide to action that ensures that the military will forever heed Party commands"
    assert meteor([said], [truth], nltk_data)["meteor"] == [pytest.approx(0.6944, abs=1e-4)]
    # Three words in one chunk: 1 - 0.5 / 27; "leaks" has the stem, "flow" the meaning.
    whole = 1 - 0.5 / 27
    assert (
        meteor(["a small leak"] * 2, ["a small leaks", "a small flow"], nltk_data)["meteor"]
        == [pytest.approx(whole)] * 2
    )
    assert meteor(["a small leak"], ["a small heart"], nltk_data)["meteor"][0] < whole


def test_identical_reports_score_best_in_any_order(nltk_data):
    reports = [text for text in SAID if len(text.split()) > 3]
    assert bleu(reports, reports, nltk_data)["bleu"] == pytest.approx([1.0] * len(reports))
    assert rouge_l(reports, reports)["rouge_l"] == [1.0] * len(reports)
    best = [1 - 0.5 / len(nltk.word_tokenize(text)) ** 3 for text in reports]
    assert meteor(reports, reports, nltk_data)["meteor"] == pytest.approx(best)
    for metric in (bleu, rouge_l, meteor):
        (forth,), (back,) = (
            metric(said, truth, nltk_data).values() for said, truth in ((SAID, TRUTH), (SAID[::-1], TRUTH[::-1]))
        )
        assert forth == back[::-1]


def test_a_report_of_20000_words_is_no_trouble(nltk_data):
    rng = random.Random(0)
    said, truth = (" ".join(f"w{rng.randrange(9000)}" for _ in range(20_000)) for _ in range(2))
    start = time.process_time()
    for metric in (bleu, rouge_l, meteor):
        ((score,),) = metric([said], [truth], nltk_data).values()
        assert 0 < score < 0.5
    # rouge_score's own table alone would take 400 million steps of Python.
    assert time.process_time() - start < 60


def test_what_is_absent_says_how_to_get_it(tmp_path):
    """In a process of its own, since nltk keeps what it once read."""
    program = """if True:
        import nltk
        from a3tune.errors import ModelError
        from a3tune.metrics.text import bleu, meteor, rouge_l
        nltk.data.path[:] = []
        for metric, folder in ((bleu, None), (meteor, None), (meteor, FOLDER)):
            try:
                metric(["a b"], ["a b"], folder)
            except ModelError as error:
                print(error)
        print(rouge_l(["a b"], ["a b"]))
    """
    write_nltk_data(tmp_path)
    for file in (tmp_path / "corpora" / "wordnet").iterdir():
        file.unlink()
    (tmp_path / "corpora" / "wordnet").rmdir()
    program = program.replace("FOLDER", f"__import__('pathlib').Path({str(tmp_path)!r})")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second, third, rouge = done.stdout.splitlines()
    assert first == second and "nltk.downloader -d FOLDER punkt_tab" in first
    assert "nltk.downloader -d FOLDER wordnet" in third
    assert rouge == "{'rouge_l': [1.0]}"


WORDS = st.lists(st.sampled_from("abcd"), max_size=12)


@given(WORDS, WORDS)
def test_longest_common_subsequence_equals_the_table(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    assert longest_common_subsequence(first, second) == table[-1][-1]
