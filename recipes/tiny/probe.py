"""Step 4: what the shipped model's image tokens carry. A linear probe, fitted on some scans, read on others.

The tokens are those that the decoder sees (after the projector), frozen. Classes are weighed equally.
"""

import numpy as np
import torch
from scans import pixel_values, pretraining_scans
from torch import Tensor
from tower import LEVELS, targets
from transformers import LlavaForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from a3tune.data.phantom.scan import Scan
from a3tune.models import shipped

RIDGE = 10.0


@torch.no_grad()
def image_tokens(model: LlavaForConditionalGeneration, scans: list[Scan]) -> Tensor:
    """float32 [scans * N, D]."""
    pixels = torch.tensor(pixel_values([scan.image for scan in scans], OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    parts = [model.model.get_image_features(part).pooler_output for part in pixels.split(64)]
    return torch.cat([token for part in parts for token in part])


def probe(train: Tensor, train_class: Tensor, test: Tensor, test_class: Tensor) -> float:
    """Balanced accuracy of ridge regression onto the classes that have a place in both sets."""
    classes = sorted(set(train_class.tolist()) & set(test_class.tolist()))
    weight = torch.zeros(len(train))
    for c in classes:
        weight[train_class == c] = 1 / (train_class == c).sum()
    weight = weight / weight.mean()
    inputs = torch.cat([train, torch.ones(len(train), 1)], 1).double()
    wanted = torch.stack([train_class == c for c in classes], 1).double()
    scaled = inputs * weight[:, None]
    solution = torch.linalg.solve(inputs.T @ scaled + RIDGE * torch.eye(inputs.shape[1]).double(), scaled.T @ wanted)
    found = (torch.cat([test, torch.ones(len(test), 1)], 1).double() @ solution).argmax(1)
    return float(np.mean([(found[test_class == c] == i).double().mean() for i, c in enumerate(classes)]))


def main() -> None:
    model = LlavaForConditionalGeneration.from_pretrained(shipped("vlm")).eval()
    fitted, held_out = pretraining_scans(600, first=2_000_000), pretraining_scans(300, first=3_000_000)
    tokens, unseen = image_tokens(model, fitted), image_tokens(model, held_out)
    for name, classes in LEVELS.items():
        own, other = (
            torch.tensor(np.concatenate([targets(scan)[name] for scan in scans])) for scans in (fitted, held_out)
        )
        chosen, asked = (own > 0, other > 0) if name in ("kind", "size") else (own >= 0, other >= 0)
        score = probe(tokens[chosen], own[chosen], unseen[asked], other[asked])
        count = classes - 1 if name in ("kind", "size") else classes
        print(f"{name}: balanced accuracy {score:.3f}, chance {1 / count:.3f}")


if __name__ == "__main__":
    main()
