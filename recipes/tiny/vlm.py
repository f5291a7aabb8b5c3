"""Step 2: pretrain projector and decoder on captions, generic questions and position questions; the tower stays frozen.

As LLaVA-Med does zero-shot, the result answers generic questions and fails on localised ones, which it has never seen.
Tower features are computed once. Ends with an exam on scans never seen.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from scans import pixel_values, pretraining_scans
from texts import CAPTION_PROMPTS, caption, corpus, generic_question, look_question, position_question
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from a3tune.data.phantom.dataset import draw_questions
from a3tune.data.phantom.scan import Scan
from a3tune.vlm.tiny import tiny_config, tiny_processor, train_tokenizer

STAGES = {
    "words": {"caption": 0.40, "generic": 0.15, "position": 0.45},
    "organs": {"caption": 0.35, "generic": 0.10, "position": 0.20, "look": 0.35},
}
"""Odds of each task. First words and places; then to find an organ that a question names."""
TASKS = {"generic": generic_question, "position": position_question, "look": look_question}


@torch.no_grad()
def tower_features(tower: CLIPVisionModel, scans: list[Scan]) -> Tensor:
    """Patch tokens of every scan, float16 [scans, N, D]."""
    parts = [scans[start : start + 64] for start in range(0, len(scans), 64)]
    features = []
    for part in parts:
        pixels = torch.tensor(pixel_values(part, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        features.append(tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:].half())
    return torch.cat(features)


def draw_text(scan: Scan, stage: str, rng: np.random.Generator) -> tuple[str, str]:
    """Prompt and answer of a random pretraining task."""
    odds = STAGES[stage]
    task = str(rng.choice(list(odds), p=list(odds.values())))
    if task == "caption":
        return CAPTION_PROMPTS[rng.integers(len(CAPTION_PROMPTS))], caption(scan, rng)
    return TASKS[task](scan, rng)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, image_tokens: int) -> list[int]:
    """The prompt in the tiny model's chat format."""
    return tokenizer(f"USER: {'<image>' * image_tokens}\n{prompt} ASSISTANT:")["input_ids"]


def batch(tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, str]], image_tokens: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels, int64 [B, S]."""
    rows = [
        (prompt_ids(tokenizer, prompt, image_tokens), [*tokenizer(f" {answer}")["input_ids"], tokenizer.eos_token_id])
        for prompt, answer in texts
    ]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def forward_loss(model: LlavaForConditionalGeneration, features: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """Language-modelling loss from tower features instead of pixels."""
    embeds = model.get_input_embeddings()(ids)
    image = (ids == model.config.image_token_id)[..., None]
    embeds = embeds.masked_scatter(image, model.model.multi_modal_projector(features))
    hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != -100
    return nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])


@torch.no_grad()
def exam(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, scans: list[Scan]
) -> dict[str, float]:
    """Share of exact answers by question type on the demo's questions and on position questions."""
    hits: dict[str, list[bool]] = {}
    for start in range(0, len(scans), 25):
        part = scans[start : start + 25]
        pixels = torch.tensor(pixel_values(part, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        asked = []
        for index, scan in enumerate(part):
            rng = np.random.default_rng(start + index)
            asked += [
                (index, question.type, question.prompt, question.answer) for question in draw_questions(scan, rng)
            ]
            asked += [(index, f"({task})", *TASKS[task](scan, rng)) for task in ("position", "look")]
        rows = [prompt_ids(tokenizer, prompt, model.config.image_seq_length) for _, _, prompt, _ in asked]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        output = model.generate(
            input_ids=ids,
            attention_mask=(ids != 0).long(),
            pixel_values=pixels[[index for index, *_ in asked]],
            max_new_tokens=6,
            do_sample=False,
        )
        answers = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        for (_, kind, _, truth), answer in zip(asked, answers, strict=True):
            hits.setdefault(kind, []).append(answer.strip() == truth)
    return {kind: sum(hit) / len(hit) for kind, hit in sorted(hits.items())}


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
    rng = np.random.default_rng(args.seed)
    tokenizer = train_tokenizer(corpus())
    if args.init:
        model = LlavaForConditionalGeneration.from_pretrained(args.init)
    else:
        model = LlavaForConditionalGeneration(tiny_config(vocab=len(tokenizer)))
        model.model.vision_tower.load_state_dict(CLIPVisionModel.from_pretrained(args.tower).state_dict())
    scans = pretraining_scans(args.scans)
    held_out = pretraining_scans(200, first=1_000_000)
    features = tower_features(model.model.vision_tower, scans)
    model.model.vision_tower.requires_grad_(False)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / 200) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / args.steps)))
    )
    for step in range(args.steps):
        chosen = rng.integers(len(scans), size=args.batch)
        ids, labels = batch(
            tokenizer, [draw_text(scans[i], args.stage, rng) for i in chosen], model.config.image_seq_length
        )
        value = forward_loss(model, features[chosen].float(), ids, labels)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == args.steps - 1:
            scores = " ".join(f"{kind} {score:.2f}" for kind, score in exam(model, tokenizer, held_out).items())
            print(f"{time.monotonic() - start:6.0f}s step {step} loss {value.item():.3f} | exam: {scores}", flush=True)
    model.save_pretrained(args.out)
    tiny_processor(tokenizer).save_pretrained(args.out)


if __name__ == "__main__":
    main()
