"""Step 1: pretrain the vision tower densely, so that each image token carries what its patch shows.

A decoder-only objective from scratch does not achieve that at this size; CLIP's pretraining does it for real models.
Heads on the patch tokens read organ, lesion kind, lesion size and lesion centre; heads on their mean read the view.
Ends with a frozen linear probe on scans never seen.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from scans import pixel_values, pretraining_scans
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from a3tune.data.phantom.anatomy import LESION_KINDS, MODALITIES, ORGANS, VIEWS
from a3tune.data.phantom.scan import SIZE, Scan
from a3tune.vlm.tiny import PATCH_SIZE, tiny_config

GRID = SIZE // PATCH_SIZE
LEVELS = {"organ": len(ORGANS) + 1, "kind": len(LESION_KINDS) + 1, "size": 3, "centre": 2}
WHOLE = {"modality": len(MODALITIES), "view": len(VIEWS)}


def patch_share(mask: np.ndarray) -> np.ndarray:
    """Share of each patch that a mask covers, [GRID, GRID]."""
    return mask.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).mean((1, 3))


def targets(scan: Scan) -> dict[str, np.ndarray]:
    """Class of each patch for each dense head (0 = nothing there), and of the image for the others."""
    organ_share = np.stack(
        [patch_share(scan.organs[name]) if name in scan.organs else np.zeros((GRID, GRID)) for name in ORGANS]
    )
    organ = np.where(organ_share.max(0) > 0.3, organ_share.argmax(0) + 1, 0)
    kind, size, centre = (np.zeros((GRID, GRID), int) for _ in range(3))
    best = np.full((GRID, GRID), 0.06)
    for lesion in scan.lesions:
        share = patch_share(lesion.mask)
        here = share > best
        best = np.maximum(best, share)
        kind[here] = LESION_KINDS.index(lesion.kind) + 1
        size[here] = 1 + (lesion.size == "large")
        row, column = (min(GRID - 1, int(value / PATCH_SIZE)) for value in lesion.centre)
        centre[row, column] = 1
    view = next(i for i, view in enumerate(VIEWS) if (view.body, view.plane) == (scan.body, scan.plane))
    whole = {"modality": np.array(MODALITIES.index(scan.modality)), "view": np.array(view)}
    return {"organ": organ.ravel(), "kind": kind.ravel(), "size": size.ravel(), "centre": centre.ravel(), **whole}


class DenseTower(nn.Module):
    """The tower with its pretraining heads."""

    def __init__(self) -> None:
        super().__init__()
        config = tiny_config().vision_config
        self.tower = CLIPVisionModel(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, size) for name, size in (LEVELS | WHOLE).items()}
        )

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        tokens = self.norm(self.tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:])
        return {name: head(tokens if name in LEVELS else tokens.mean(1)) for name, head in self.heads.items()}


def loss(outputs: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """Sum of cross entropies; lesion patches are rare and count four-fold."""
    total = torch.zeros(())
    for name, logits in outputs.items():
        weight = torch.ones(logits.shape[-1])
        if name in ("kind", "size", "centre"):
            weight[1:] = 4.0
        total = total + F.cross_entropy(logits.flatten(0, -2), truth[name].flatten(), weight=weight)
    return total


def tensors(scans: list[Scan]) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixels and targets of all scans."""
    per_scan = [targets(scan) for scan in scans]
    truth = {name: torch.tensor(np.stack([row[name] for row in per_scan])) for name in per_scan[0]}
    return torch.tensor(pixel_values([scan.image for scan in scans], OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)), truth


@torch.no_grad()
def accuracies(model: DenseTower, pixels: Tensor, truth: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy of each head; for lesions only over patches that have one."""
    outputs = [model(part) for part in pixels.split(64)]
    scores = {}
    for name in truth:
        hit = torch.cat([output[name] for output in outputs]).argmax(-1) == truth[name]
        chosen = truth[name] > 0 if name in LEVELS else torch.ones_like(hit)
        scores[name] = hit[chosen].float().mean().item()
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scans", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(args.seed)
    pixels, truth = tensors(pretraining_scans(args.scans))
    held_out = tensors(pretraining_scans(400, first=1_000_000))
    model = DenseTower()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    )
    for step in range(args.steps):
        rows = torch.randint(len(pixels), (args.batch,))
        value = loss(model(pixels[rows]), {name: target[rows] for name, target in truth.items()})
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == args.steps - 1:
            scores = " ".join(f"{name} {score:.3f}" for name, score in accuracies(model, *held_out).items())
            print(
                f"{time.monotonic() - start:6.0f}s step {step} loss {value.item():.3f} | held out: {scores}", flush=True
            )
    model.tower.save_pretrained(args.out)


if __name__ == "__main__":
    main()
