"""Do image tokens inside the region tell which mark stands elsewhere in the picture? Then looking there cannot help.

    python leak.py --model base marked/agree.jsonl marked/disagree.jsonl
    python leak.py --model tiny runs/marks/data/marks/validation.jsonl

A linear probe reads the mark from the mean of the region's tokens, as the decoder sees them; it is fitted on half of
the patients and asked about the others. Every question is there under two marks, so the answer tells nothing: a probe
is right if it ranks the mark of a picture over the other one's; chance is 50 %.
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from a3tune.data.rows import read_rows
from a3tune.evaluation.asking import read
from a3tune.metrics.stats import seeds_interval
from a3tune.types import Sample
from a3tune.vlm.load import Vlm, load_vlm
from a3tune.vlm.patches import token_weights

RIDGE = 10.0
FOLDS = 2
AROUND = 9
"""Pixels that a resampled pixel may come from."""


def pairs_of(files: Sequence[Path]) -> list[tuple[Sample, Sample]]:
    """Each question under two marks."""
    found: dict[str, dict[str, Sample]] = defaultdict(dict)
    for sample in (sample for file in files for sample in read_rows(file)):
        test = sample.meta.get("test", "")
        if sample.meta["mark"] != "none" and sample.regions and test != "random":
            found[sample.id.removesuffix(f"-{test}")].setdefault(sample.meta["mark"], sample)
    return [(first, second) for first, second, *_ in (list(own.values()) for own in found.values() if len(own) > 1)]


@torch.no_grad()
def region_tokens(vlm: Vlm, pair: tuple[Sample, Sample]) -> np.ndarray | None:
    """Tokens [2, n, D] of the region in both pictures, without those that a mark touches; None where there are none."""
    seen = [read(vlm, sample) for sample in pair]
    pixels = [np.asarray(one.image, dtype=np.int16) for one in seen]
    differs = Image.fromarray((pixels[0] != pixels[1]).any(-1)).convert("L").filter(ImageFilter.MaxFilter(AROUND))
    touched_N = token_weights(np.asarray(differs) > 0, seen[0].example.boxes) > 0
    if seen[0].region_N is None or not (inside_N := np.asarray(seen[0].region_N, dtype=bool) & ~touched_N).any():
        return None
    images = [one.example.images["pixel_values"] for one in seen]
    tokens = [torch.cat(list(vlm.model.model.get_image_features(image).pooler_output)) for image in images]
    return np.stack([own.float().numpy()[inside_N] for own in tokens])


def right(pairs: Sequence[tuple[Sample, Sample]], seen: Mapping[int, np.ndarray]) -> np.ndarray:
    """Of each pair the share of its pictures whose mark is told; `seen`: features [2, D] by position of the pair."""
    patients = sorted({first.meta["patient"] for first, _ in pairs})
    fold = {patient: number % FOLDS for number, patient in enumerate(patients)}
    marks = sorted({sample.meta["mark"] for pair in pairs for sample in pair})
    told = np.full(len(pairs), np.nan)
    for number in range(FOLDS):
        learnt = [at for at in seen if fold[pairs[at][0].meta["patient"]] != number]
        inputs = np.concatenate([seen[at] for at in learnt])
        mean, spread = inputs.mean(0), inputs.std(0) + 1e-6
        wanted = np.array([[sample.meta["mark"] == mark for mark in marks] for at in learnt for sample in pairs[at]])
        scaled = (inputs - mean) / spread
        weights = np.linalg.solve(scaled.T @ scaled + RIDGE * np.eye(scaled.shape[1]), scaled.T @ (wanted - 0.5))
        for at in set(seen) - set(learnt):
            first, second = (marks.index(sample.meta["mark"]) for sample in pairs[at])
            scores = ((seen[at] - mean) / spread) @ weights
            told[at] = np.mean([scores[0, first] > scores[0, second], scores[1, second] > scores[1, first]])
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("data", type=Path, nargs="+")
    options = parser.parse_args()
    vlm = load_vlm(options.model, device="cpu", dtype="float32", attention=False)
    pairs = pairs_of(options.data)
    found = {at: region_tokens(vlm, pair) for at, pair in enumerate(pairs)}
    known = {at: own for at, own in found.items() if own is not None}
    changes = [np.linalg.norm(one - two) / np.linalg.norm(one) for one, two in known.values()]
    print(f"{len(known)} of {len(pairs)} questions have tokens in their region that no mark touches")
    print(f"another mark changes them by {100 * np.median(changes):.1f} % of their length (median)")
    told = right(pairs, {at: own.mean(1) for at, own in known.items()})
    groups = [first.meta["patient"] for first, _ in pairs]
    kinds = np.array([first.meta["question_type"] for first, _ in pairs])
    for kind in ("all", *sorted(set(kinds))):
        chosen = np.flatnonzero(~np.isnan(told) & ((kinds == kind) | (kind == "all")))
        share = seeds_interval(told[None, chosen], [groups[at] for at in chosen])
        print(f"{kind:16} mark told {100 * share.mean:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]")


if __name__ == "__main__":
    main()
