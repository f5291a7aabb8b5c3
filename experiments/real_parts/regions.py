"""Weak labels with real parts: LiteMedSAM or superpixels propose, the stand-in ranker ranks; quality on the MR volume.

python regions.py --model base --organs data/organs.jsonl --data data/train.jsonl --proposer litemedsam --out labels
"""

import argparse
import time
from pathlib import Path

from ranker import VISUAL_PROMPT, RidgeRanker

from a3tune.data.rows import read_rows
from a3tune.labels.make import LabelMaker
from a3tune.labels.propose import make_proposer
from a3tune.labels.quality import label_quality
from a3tune.labels.store import LabelStore, label_images

TOP_K, MIN_IOU = 4, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--organs", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="questions to label")
    parser.add_argument("--proposer", default="superpixels")
    parser.add_argument("--weights", type=Path, help="folder of the proposer's weights")
    parser.add_argument("--max-segments", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True, help="label store")
    options = parser.parse_args()

    organs = read_rows(options.organs)
    ranker = RidgeRanker(options.model, [sample for sample in organs if sample.meta["modality"] == "ct"])
    proposer = make_proposer(options.proposer, options.weights, {"max_segments": options.max_segments})
    held_out = [sample for sample in organs if sample.meta["modality"] == "mr"]
    asked = [sample for file in options.data for sample in read_rows(file)]
    started = time.perf_counter()
    run = label_images(
        [*held_out, *asked],
        LabelMaker(proposer, ranker, VISUAL_PROMPT),
        options.out,
        progress=lambda done, total: print(f"{done}/{total}", end="\r", flush=True),
    )
    seconds = time.perf_counter() - started
    print(f"{run.images} images, {run.proposed} proposed now, {seconds:.0f} s; {len(run.failures)} failed")
    store = LabelStore(options.out)
    quality = label_quality(
        held_out, lambda sample: store.labels(sample, top_k=None), top_k=TOP_K, min_iou=MIN_IOU, by=["organ"]
    )
    print(f"MR volume, K = {TOP_K}, IoU >= {MIN_IOU}: recall, ceiling (all segments), mean best IoU of the K")
    for name, found in quality.items():
        print(f"{name:16}{found.recall:6.2f}{found.ceiling_recall:6.2f}{found.best_iou:6.2f}")


if __name__ == "__main__":
    main()
