"""Step 2: pretrain projector and decoder; the tower stays frozen.

Three stages: words and places; finding an organ that a question names; reading the one region that is lit. The result
reads what is lit but does not look where it is told to: of a whole scan it answers from any lesion that it sees, as the
paper's Fig. 1 shows of real models. Tower features are computed once. Ends with an exam on scans never seen.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from exam import exam, in_words
from forward import Text, batch, forward_loss, tower_features
from scans import lit, pretraining_scans
from texts import CAPTION_PROMPTS, caption, corpus, generic_question, look_question, position_question
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from a3tune.data.phantom.questions import ask
from a3tune.data.phantom.scan import Scan
from a3tune.vlm.tiny import tiny_config, tiny_processor, train_tokenizer

STAGES = {
    "words": {"caption": 0.40, "generic": 0.15, "position": 0.45},
    "organs": {"caption": 0.35, "generic": 0.10, "position": 0.20, "look": 0.35},
    "read": {"caption": 0.20, "generic": 0.05, "position": 0.15, "look": 0.10, "read": 0.50},
}
"""Odds of each task."""
TASKS = {"generic": generic_question, "position": position_question, "look": look_question}
LIT_PER_SCAN = 3
READ_ODDS = {"presence": 0.1, "presence of kind": 0.15, "kind": 0.2, "size": 0.15, "position": 0.2, "count": 0.2}
"""Of question types about what is lit: more of those that are harder to learn."""


def lit_questions(scans: list[Scan], rng: np.random.Generator) -> tuple[list[np.ndarray], list[Text]]:
    """Localised questions about scans that are dark outside the region that decides the answer."""
    types = rng.choice(list(READ_ODDS), (len(scans), LIT_PER_SCAN), p=list(READ_ODDS.values()))
    drawn = [(scan, ask(scan, str(kind), rng)) for scan, own in zip(scans, types, strict=True) for kind in own]
    asked = [(scan, question) for scan, question in drawn if question is not None and question.region is not None]
    images = [lit(scan.image, question.region) for scan, question in asked]
    return images, [(question.prompt, question.answer) for _, question in asked]


class Tasks:
    """Draws texts of a stage, each with the tower features of its image."""

    def __init__(self, stage: str, tower: CLIPVisionModel, scans: list[Scan], rng: np.random.Generator) -> None:
        self.odds, self.scans, self.rng = STAGES[stage], scans, rng
        self.whole = tower_features(tower, [scan.image for scan in scans])
        if "read" in self.odds:
            images, self.read_texts = lit_questions(scans, rng)
            self.lit = tower_features(tower, images)

    def draw(self, size: int) -> tuple[list[Text], Tensor]:
        """Texts, and features float32 [size, N, D]."""
        tasks = self.rng.choice(list(self.odds), size=size, p=list(self.odds.values()))
        texts, features = zip(*(self._draw(str(task)) for task in tasks), strict=True)
        return list(texts), torch.stack(features).float()

    def _draw(self, task: str) -> tuple[Text, Tensor]:
        if task == "read":
            chosen = self.rng.integers(len(self.read_texts))
            return self.read_texts[chosen], self.lit[chosen]
        chosen = self.rng.integers(len(self.scans))
        scan, features = self.scans[chosen], self.whole[chosen]
        if task == "caption":
            prompt = CAPTION_PROMPTS[self.rng.integers(len(CAPTION_PROMPTS))]
            return (prompt, caption(scan, self.rng)), features
        return TASKS[task](scan, self.rng), features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES, required=True)
    start_from = parser.add_mutually_exclusive_group(required=True)
    start_from.add_argument("--tower", type=Path, help="this tower and a new decoder")
    start_from.add_argument("--init", type=Path, help="what an earlier stage made")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scans", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(corpus())
    if args.init:
        model = LlavaForConditionalGeneration.from_pretrained(args.init)
    else:
        model = LlavaForConditionalGeneration(tiny_config(vocab=len(tokenizer)))
        model.model.vision_tower.load_state_dict(CLIPVisionModel.from_pretrained(args.tower).state_dict())
    rng = np.random.default_rng(args.seed)
    tasks = Tasks(args.stage, model.model.vision_tower, pretraining_scans(args.scans), rng)
    held_out = pretraining_scans(200, first=1_000_000)
    model.model.vision_tower.requires_grad_(False)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / 200) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / args.steps)))
    )
    for step in range(args.steps):
        texts, features = tasks.draw(args.batch)
        value = forward_loss(model, features, *batch(tokenizer, texts, model.config.image_seq_length))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == args.steps - 1:
            found = in_words(exam(model, tokenizer, held_out))
            print(f"{time.monotonic() - start:6.0f}s step {step} loss {value.item():.3f} | exam: {found}", flush=True)
    model.save_pretrained(args.out)
    tiny_processor(tokenizer).save_pretrained(args.out)


if __name__ == "__main__":
    main()
