"""Scores of answers: LLaVA-Med's, reproduced with their quirks, and stricter ones beside them.

Knows two texts, prediction and reference; not which model wrote the first.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Literal

from a3tune.types import AnswerType, Sample

ClosedMode = Literal["llava-med", "strict"]
AnswerScore = Callable[[str, str, AnswerType, Sequence[str]], float | None]
"""(prediction, answer, the question's type, its options) -> score; None where the question has no such score."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32
"""LLaVA-Med passes a regex flag of value 32 where `re.sub` takes the count."""
_DIGIT_COMMA = re.compile(r"\d,\d")
_ARTICLES = ("a", "an", "the")
_NUMERALS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMERALS.split())} | {"none": "0"}
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at in range(len(word)) if word[at] == "'"
}
"""Words that lack one apostrophe -> the word, as in the VQA evaluation that LLaVA-Med took them from."""
_CONTRACTIONS["somebody'd"] = "somebodyd"


def normalise(text: str) -> str:
    """LLaVA-Med's normalisation of an answer, applied twice as its script does.

    Lower-cases, drops or spaces punctuation, turns number words into digits, drops articles, expands contractions.
    """
    return _normalise_once(_normalise_once(text.lower()))


def open_recall(prediction: str, answer: str, *, clipped: bool = False) -> float:
    """Share of the answer's words that the prediction holds, in [0, 1].

    LLaVA-Med's tp counts how often shared words stand in the PREDICTION, so that repeating them raises the score;
    `clipped` counts none more often than the answer does. 0 when either side is empty.
    """
    given, wanted = Counter(normalise(prediction).split()), Counter(normalise(answer).split())
    if clipped:
        return (given & wanted).total() / wanted.total() if wanted else 0.0
    hits = sum(count for word, count in given.items() if word in wanted)
    misses = sum(count for word, count in wanted.items() if word not in given)
    return hits / (hits + misses) if hits else 0.0


def closed_accuracy(prediction: str, answer: str, mode: ClosedMode = "llava-med") -> float:
    """1.0 if a closed question is answered right, else 0.0.

    `llava-med`: right iff "yes" or "no" is a SUBSTRING of the prediction and the answer is one too; "normal" holds a
    "no". (Its script leaves wrong answers that hold a yes or no out of the mean, which raises it; here they count.)
    `strict`: whole words; the prediction's first yes or no must be the answer, any other answer must stand in it.
    """
    said, truth = normalise(prediction), normalise(answer)
    if mode == "llava-med":
        return float(("yes" in said or "no" in said) and truth in said)
    if truth in ("yes", "no"):
        return float(next((word for word in said.split() if word in ("yes", "no")), None) == truth)
    return float(bool(truth) and f" {truth} " in f" {said} ")


def choice_accuracy(prediction: str, answer: str, options: Sequence[str]) -> float:
    """1.0 if prediction and answer resemble the same of the options most, as OmniMedVQA's script has it, else 0.0.

    Any text resembles one of them, however little. Raises ValueError without options.
    """
    if not options:
        raise ValueError("choice_accuracy: expected at least one option")
    return float(_most_similar(options, prediction) == _most_similar(options, answer))


def of_type(kind: AnswerType, score: Callable[[str, str], float]) -> AnswerScore:
    """A score of (prediction, answer) that every question of this type has."""
    return lambda prediction, answer, answer_type, options: score(prediction, answer) if answer_type == kind else None


def published_closed(prediction: str, answer: str, answer_type: AnswerType, options: Sequence[str]) -> float | None:
    """`closed_accuracy` as the paper's numbers count it: of the closed questions whose answer holds "yes" or "no".

    Inside a word counts as well: published numbers are shares of these questions (355 of SLAKE's 416 closed test
    questions, 254 of VQA-RAD's 272).
    """
    truth = normalise(answer)
    defined = answer_type == "closed" and ("yes" in truth or "no" in truth)
    return closed_accuracy(prediction, answer) if defined else None


def published_choice(prediction: str, answer: str, answer_type: AnswerType, options: Sequence[str]) -> float | None:
    """`choice_accuracy` of the multiple-choice questions whose options are known."""
    return choice_accuracy(prediction, answer, options) if answer_type == "choice" and options else None


def hallucination(prediction: str, answer: str, answer_type: AnswerType, options: Sequence[str]) -> float | None:
    """1.0 if a closed question with the answer "no" is answered "yes"; 0 is good."""
    defined = answer_type == "closed" and normalise(answer) == "no"
    return closed_accuracy(prediction, "yes", "strict") if defined else None


def prior_baseline(train: Sequence[Sample], test: Sequence[Sample]) -> list[str]:
    """Answers to `test` without looking: the most frequent one in `train` to the same prompt.

    Backs off to the same question type (`meta["question_type"]`), the same answer type, any question. Of equally
    frequent answers the first wins. Raises ValueError without training samples.
    """
    if not train:
        raise ValueError("prior_baseline: expected at least one training sample")
    counts: dict[tuple[str, ...], Counter[str]] = {}
    for sample in train:
        for key in _prior_keys(sample):
            counts.setdefault(key, Counter())[sample.answer] += 1
    most_common = {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
    return [next(most_common[key] for key in _prior_keys(sample) if key in most_common) for sample in test]


def _prior_keys(sample: Sample) -> list[tuple[str, ...]]:
    """What a sample has in common with others, closest first."""
    kind = sample.answer_type
    question_type = [("question type", kind, sample.meta["question_type"])] if "question_type" in sample.meta else []
    return [("prompt", kind, sample.prompt), *question_type, ("answer type", kind), ("any",)]


def _most_similar(options: Sequence[str], text: str) -> int:
    """Index of the option with the highest ratio of difflib, which depends on the order of its two texts; of equally
    similar ones the last, as published."""
    ratios = [SequenceMatcher(None, option, text).ratio() for option in options]
    return max(range(len(options)), key=lambda index: (ratios[index], index))


def _normalise_once(text: str) -> str:
    has_digit_comma = bool(_DIGIT_COMMA.search(text))
    spaced = text
    for mark in _PUNCTUATION:
        dropped = has_digit_comma or f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if dropped else " ")
    words = _PERIOD.sub("", spaced, count=_PERIODS_REMOVED).lower().split()
    numbered = (_NUMBERS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)
