"""What the base answers: of whole scans, and of scans where only the region that decides the answer is lit.

    python exam.py

Questions about scans never seen, every type of every scan. An answer counts if greedy decoding would give exactly it.
A base that reads answers the second kind; one that also finds what a question names answers the first as well.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from forward import Text, answer_logits, batch, tower_features
from scans import lit, pretraining_scans
from texts import look_question, position_question
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from a3tune.data.phantom.questions import GENERIC_TYPES, LOCALISED_TYPES, ORGAN_TYPES, ask
from a3tune.data.phantom.scan import Scan
from a3tune.models import shipped

TASKS = {"(position)": position_question, "(look)": look_question}
"""Pretraining's own questions."""


def exam(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, scans: list[Scan]
) -> dict[str, tuple[int, float, float, float]]:
    """By question type: questions, share of their most frequent answer, of exact answers on whole scans and lit ones.

    The last is NaN where it is not asked.
    """
    asked, whole, shown = _questions(scans)
    seen = _exact(model, tokenizer, whole, [text for _, text in asked])
    readable = [index for index, image in enumerate(shown) if image is not None]
    read = np.full(len(asked), np.nan)
    read[readable] = _exact(
        model, tokenizer, [image for image in shown if image is not None], [asked[index][1] for index in readable]
    )
    found = {}
    for kind in dict.fromkeys(kind for kind, _ in asked):
        rows = [index for index, (own, _) in enumerate(asked) if own == kind]
        answers = Counter(asked[index][1][1] for index in rows)
        found[kind] = (len(rows), max(answers.values()) / len(rows), float(seen[rows].mean()), float(read[rows].mean()))
    return found


def in_words(found: dict[str, tuple[int, float, float, float]]) -> str:
    """One line for a training's log."""
    return " ".join(f"{kind} {seen:.2f}/{read:.2f}" for kind, (_, _, seen, read) in found.items())


def _questions(scans: list[Scan]) -> tuple[list[tuple[str, Text]], list[np.ndarray], list[np.ndarray | None]]:
    """Types and texts, whole images, and the lit ones where the region can be read alone."""
    asked: list[tuple[str, Text]] = []
    whole: list[np.ndarray] = []
    shown: list[np.ndarray | None] = []
    for number, scan in enumerate(scans):
        rng = np.random.default_rng(number)
        for kind in (*GENERIC_TYPES, *LOCALISED_TYPES):
            question = ask(scan, kind, rng)
            if question is not None:
                asked.append((kind, (question.prompt, question.answer)))
                whole.append(scan.image)
                shown.append(lit(scan.image, question.region) if kind in ORGAN_TYPES else None)
        for name, task in TASKS.items():
            asked.append((name, task(scan, rng)))
            whole.append(scan.image)
            shown.append(None)
    return asked, whole, shown


@torch.no_grad()
def _exact(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    images: list[np.ndarray],
    texts: list[Text],
) -> np.ndarray:
    """Whether each answer is what greedy decoding gives: each of its tokens is the likeliest after those before it."""
    right = np.ones(len(texts))
    for start in range(0, len(texts), 64):
        part = slice(start, start + 64)
        ids, labels = batch(tokenizer, texts[part], model.config.image_seq_length)
        features = tower_features(model.model.vision_tower, images[part]).float()
        logits, tokens, owners = answer_logits(model, features, ids, labels)
        right[start + owners[logits.argmax(-1) != tokens].numpy()] = 0
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=shipped("vlm"), help="a model folder (the shipped base)")
    parser.add_argument("--scans", type=int, default=400)
    args = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(args.model).eval()
    found = exam(model, AutoTokenizer.from_pretrained(args.model), pretraining_scans(args.scans, first=1_000_000))
    print(f"{'question':18}{'asked':>7}{'most frequent answer':>22}{'whole scan':>12}{'region lit':>12}")
    for kind, (count, prior, seen, read) in found.items():
        shown = "" if np.isnan(read) else f"{read:.2f}"
        print(f"{kind:18}{count:>7}{prior:>22.2f}{seen:>12.2f}{shown:>12}")


if __name__ == "__main__":
    main()
