"""How alike two reports are word by word: BLEU, ROUGE-L, METEOR, as their packages define them.

Knows words, no meaning. Every function takes predictions and references, one for one, and the folder of nltk's data
(None: where nltk itself looks), and returns its score in [0, 1] for each pair. Raises ModelError when a package or a
corpus is not here; nothing is downloaded. Time grows linearly with the length of a report (ROUGE-L: its square / 64).
"""

from collections.abc import Sequence
from pathlib import Path

from a3tune.errors import ModelError

Texts = Sequence[str]
Scores = dict[str, list[float]]
"""By name of the metric, one score per pair."""


def bleu(predictions: Texts, references: Texts, nltk_data: Path | None = None) -> Scores:
    """Sentence BLEU-4 with smoothing method 4 (Chen and Cherry, 2014) on `word_tokenize`: `bleu`."""
    pairs = _tokenized(predictions, references, nltk_data)
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method4
    return {"bleu": [float(sentence_bleu([truth], said, smoothing_function=smoothing)) for said, truth in pairs]}  # pyright: ignore[reportArgumentType]


def rouge_l(predictions: Texts, references: Texts, nltk_data: Path | None = None) -> Scores:
    """F1 of the longest common subsequence (Lin, 2004) of stemmed words a-z, 0-9: `rouge_l`.

    Words are rouge_score's; its table of the subsequence takes minutes and gigabytes for long reports, ours does not.
    """
    try:
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as error:
        raise _no_package("rouge-score") from error
    tokenizer = DefaultTokenizer(use_stemmer=True)
    scores = []
    for said, truth in zip(predictions, references, strict=True):
        words, wanted = tokenizer.tokenize(said), tokenizer.tokenize(truth)
        common = longest_common_subsequence(words, wanted)
        scores.append(2 * common / (len(words) + len(wanted)) if common else 0.0)
    return {"rouge_l": scores}


def meteor(predictions: Texts, references: Texts, nltk_data: Path | None = None) -> Scores:
    """METEOR (Banerjee and Lavie, 2005) with nltk's settings on `word_tokenize`: `meteor`."""
    pairs = _tokenized(predictions, references, nltk_data)
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import meteor_score

    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise _no_data("wordnet") from error
    return {"meteor": [float(meteor_score([truth], said)) for said, truth in pairs]}


def longest_common_subsequence(first: Texts, second: Texts) -> int:
    """Length of the longest sequence of words that both hold in this order.

    Bit-parallel (Hyyro, 2004): bit i is 0 once a row of the usual table grows at word i of `first`.
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    whole = (1 << len(first)) - 1
    row = whole
    for word in second:
        matched = row & positions.get(word, 0)
        row = (row + matched | row - matched) & whole
    return len(first) - row.bit_count()


def _tokenized(predictions: Texts, references: Texts, nltk_data: Path | None) -> list[tuple[list[str], list[str]]]:
    try:
        import nltk
    except ImportError as error:
        raise _no_package("nltk") from error
    # nltk only reads below the folders of this list.
    if nltk_data and str(nltk_data) not in nltk.data.path:
        nltk.data.path.insert(0, str(nltk_data))
    try:
        return [
            (nltk.word_tokenize(said), nltk.word_tokenize(truth))
            for said, truth in zip(predictions, references, strict=True)
        ]
    except LookupError as error:
        # Without Punkt, full stops inside a report stay part of the word before them: another number, so none at all.
        raise _no_data("punkt_tab") from error


def _no_package(name: str) -> ModelError:
    return ModelError(f'package {name} is not installed: pip install "a3tune[reports]"')


def _no_data(name: str) -> ModelError:
    return ModelError(
        f"nltk's {name} is not here: where there is a network, run `python -m nltk.downloader -d FOLDER {name}`, then "
        "give that folder as nltk_data"
    )
