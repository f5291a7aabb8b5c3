"""One pass of the tiny LLaVA from tower features: texts -> ids and labels -> logits. The tower runs once per image."""

import numpy as np
import torch
from scans import pixel_values
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

Text = tuple[str, str]
"""Prompt and answer."""


@torch.no_grad()
def tower_features(tower: CLIPVisionModel, images: list[np.ndarray]) -> Tensor:
    """Patch tokens of every image, float16 [images, N, D]."""
    features = []
    for start in range(0, len(images), 64):
        pixels = torch.tensor(pixel_values(images[start : start + 64], OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        features.append(tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:].half())
    return torch.cat(features)


def batch(tokenizer: PreTrainedTokenizerFast, texts: list[Text], image_tokens: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels in the tiny model's chat format, int64 [B, S]."""
    rows = [
        (
            tokenizer(f"USER: {'<image>' * image_tokens}\n{prompt} ASSISTANT:")["input_ids"],
            [*tokenizer(f" {answer}")["input_ids"], tokenizer.eos_token_id],
        )
        for prompt, answer in texts
    ]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def answer_logits(
    model: LlavaForConditionalGeneration, features: Tensor, ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [M, V] of the M answer tokens of a batch, the tokens themselves, and whose they are, int64 [M] each."""
    embeds = model.get_input_embeddings()(ids)
    image = (ids == model.config.image_token_id)[..., None]
    embeds = embeds.masked_scatter(image, model.model.multi_modal_projector(features))
    hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != -100
    return model.lm_head(hidden[wanted]), labels[:, 1:][wanted], wanted.nonzero()[:, 0]


def forward_loss(model: LlavaForConditionalGeneration, features: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """Language-modelling loss of the answers."""
    logits, tokens, _ = answer_logits(model, features, ids, labels)
    return nn.functional.cross_entropy(logits, tokens)
