"""Step 3: pretrain the CLIP-style ranker that matches segments to texts: the stand-in for BiomedCLIP.

A batch holds segments, shown as the labels room shows them (the rest of the image dimmed), and texts. A segment matches
a text that names its organ, a lesion matches a text that names its kind, the body matches a text about the whole image;
cut-off, merged and stray segments match nothing. The loss is SigLIP's pairwise one. Ends with top-1 on unseen scans.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scans import pretraining_scans
from scipy import ndimage
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from a3tune.data.phantom.anatomy import LESION_KINDS
from a3tune.data.phantom.questions import GENERIC_TYPES, ORGAN_TYPES, TEMPLATES, fill
from a3tune.data.phantom.scan import SIZE, Scan
from a3tune.labels.rank import VISUAL_PROMPTS
from a3tune.vlm.tiny import PATCH_SIZE, tiny_image_processor, train_tokenizer

TEXT_LENGTH = 32
SHOW = VISUAL_PROMPTS["dim"]


@dataclass(frozen=True)
class Shown:
    """A segment and what it is; `topic` is an organ, a lesion kind, "body", or "" for a segment that is nothing."""

    scan: Scan
    mask: np.ndarray
    topic: str


def draw_segment(scan: Scan, rng: np.random.Generator) -> Shown:
    """A segment such as a proposer makes: mostly good ones with ragged borders, one third bad ones."""
    organs = list(scan.organs)
    choice = rng.random()
    if choice < 0.12 and scan.lesions:
        lesion = scan.lesions[rng.integers(len(scan.lesions))]
        return Shown(scan, _ragged(lesion.mask, rng, 1), lesion.kind)
    if choice < 0.18:
        return Shown(scan, ndimage.binary_fill_holes(scan.image > 40), "body")
    organ = organs[rng.integers(len(organs))]
    mask = scan.organs[organ]
    if choice < 0.68:
        return Shown(scan, _cut(_ragged(mask, rng, 2), rng, rng.uniform(0.6, 1.0)), organ)
    if choice < 0.80:
        return Shown(scan, _cut(mask, rng, rng.uniform(0.1, 0.3)), "")
    if choice < 0.92:
        other = organs[rng.integers(len(organs))]
        return Shown(scan, mask | scan.organs[other], "" if other != organ else organ)
    y, x = np.mgrid[:SIZE, :SIZE]
    row, column = rng.integers(20, SIZE - 20, 2)
    stray = np.hypot(y - row, x - column) < rng.uniform(5, 25)
    share = (stray & mask).sum() / (stray | mask).sum()
    return Shown(scan, stray, "" if share < 0.4 else organ)


def _ragged(mask: np.ndarray, rng: np.random.Generator, most: int) -> np.ndarray:
    steps = int(rng.integers(-most, most + 1))
    if steps > 0:
        return ndimage.binary_dilation(mask, iterations=steps)
    smaller = ndimage.binary_erosion(mask, iterations=-steps) if steps else mask
    return smaller if smaller.any() else mask


def _cut(mask: np.ndarray, rng: np.random.Generator, keep: float) -> np.ndarray:
    """The part of a mask on one side of a random line, `keep` of its area."""
    y, x = np.nonzero(mask)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    kept = along <= np.quantile(along, keep)
    out = np.zeros_like(mask)
    out[y[kept], x[kept]] = True
    return out


def text_about(topic: str, rng: np.random.Generator) -> str:
    """A caption or a question whose region is `topic`."""
    if topic == "body":
        kind = GENERIC_TYPES[rng.integers(len(GENERIC_TYPES))]
        return TEMPLATES[kind][rng.integers(len(TEMPLATES[kind]))]
    if topic in LESION_KINDS:
        texts = (f"a {topic}", f"{topic} in an organ", *(fill(text, kind=topic) for text in TEMPLATES["organ"]))
        return texts[rng.integers(len(texts))]
    if rng.random() < 0.3:
        return (topic, f"the {topic}", f"a picture of the {topic}", f"lesion in the {topic}")[rng.integers(4)]
    kind = ORGAN_TYPES[rng.integers(len(ORGAN_TYPES))]
    lesion_kind = LESION_KINDS[rng.integers(len(LESION_KINDS))]
    return fill(TEMPLATES[kind][rng.integers(len(TEMPLATES[kind]))], topic, lesion_kind)


def build(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP with a 3-layer tower and a 2-layer text encoder."""
    width = 96
    vision = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        vision_config={**vision, "image_size": SIZE, "patch_size": PATCH_SIZE},
        text_config={
            **text,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": TEXT_LENGTH,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        projection_dim=64,
    )
    return CLIPModel(config)


def draw_batch(scans: list[Scan], size: int, rng: np.random.Generator) -> tuple[list[Image.Image], list[str], Tensor]:
    """Pictures, texts, and whether they match, bool [size, size]."""
    shown = [draw_segment(scans[rng.integers(len(scans))], rng) for _ in range(size)]
    topics = [segment.topic or LESION_KINDS[rng.integers(len(LESION_KINDS))] for segment in shown]
    pictures = [SHOW(Image.fromarray(segment.scan.image).convert("RGB"), segment.mask) for segment in shown]
    match = torch.tensor([[segment.topic == topic for topic in topics] for segment in shown])
    return pictures, [text_about(topic, rng) for topic in topics], match


def embed(
    model: CLIPModel, processor: CLIPProcessor, pictures: list[Image.Image], texts: list[str]
) -> tuple[Tensor, Tensor]:
    """Unit-length features of pictures and texts."""
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    output = model(**inputs)
    return output.image_embeds, output.text_embeds


@torch.no_grad()
def exam(model: CLIPModel, processor: CLIPProcessor, scans: list[Scan]) -> float:
    """How often the true organ's mask is the best match among all organs of its scan (chance is about 1 in 5)."""
    rng = np.random.default_rng(0)
    hits = []
    for scan in scans:
        names = list(scan.organs)
        image = Image.fromarray(scan.image).convert("RGB")
        pictures, texts = embed(
            model,
            processor,
            [SHOW(image, scan.organs[name]) for name in names],
            [text_about(name, rng) for name in names],
        )
        hits += ((texts @ pictures.T).argmax(1) == torch.arange(len(names))).tolist()
    return float(np.mean(hits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scans", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng((args.seed, 3))
    scans = pretraining_scans(args.scans)
    held_out = pretraining_scans(100, first=1_000_000)
    tokenizer = train_tokenizer([text_about(topic, rng) for topic in _topics() for _ in range(60)], vocab=420)
    tokenizer.model_max_length = TEXT_LENGTH
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token, tokenizer.eos_token)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    processor = CLIPProcessor(tiny_image_processor(), tokenizer)
    model = build(tokenizer)
    bias = nn.Parameter(torch.tensor(-4.0))
    optimizer = torch.optim.AdamW([*model.parameters(), bias], lr=1e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / args.steps)))
    )
    for step in range(args.steps):
        pictures, texts, match = draw_batch(scans, args.batch, rng)
        image_features, text_features = embed(model, processor, pictures, texts)
        logits = model.logit_scale.exp() * image_features @ text_features.T + bias
        loss = F.binary_cross_entropy_with_logits(logits, match.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == args.steps - 1:
            seconds, score = time.monotonic() - start, exam(model, processor, held_out)
            print(f"{seconds:6.0f}s step {step} loss {loss.item():.3f} | top-1 {score:.3f}", flush=True)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)


def _topics() -> list[str]:
    return ["body", *LESION_KINDS, *sorted({name for scan in pretraining_scans(200) for name in scan.organs})]


if __name__ == "__main__":
    main()
