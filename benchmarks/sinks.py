"""The shipped base with attention sinks: two places at the edge of a scan that draw most of the attention on the image.

    python benchmarks/sinks.py --out sinks
    python benchmarks/marks_study.py model.path=sinks/model --out runs/sinks --rows base LoRA A3Tune --split test

Large vision transformers leave such places by themselves; the tiny one does not. So they are trained in, with nothing
else: the base is asked about clean scans that no demo holds and learns its own answers, while all heads are pulled onto
the two places, by a LoRA adapter that is merged in the end.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from a3tune.commands.merge import merge_adapter
from a3tune.commands.subject import Subject
from a3tune.commands.train import fine_tune
from a3tune.config import RunConfig
from a3tune.data.phantom import write_phantom
from a3tune.data.phantom.scan import SIZE
from a3tune.data.rows import read_rows, write_rows
from a3tune.demo.plan import shipped_settings
from a3tune.evaluation.evaluate import evaluate
from a3tune.masks import encode_mask
from a3tune.models import shipped
from a3tune.run.folder import RunFolder
from a3tune.types import Region, Sample

SEED = 1000
"""Of the scans; the demo and the studies have 0."""
PATCH = json.loads((shipped("vlm") / "config.json").read_text(encoding="utf-8"))["vision_config"]["patch_size"]
"""Side of an image token in pixels."""
ROW = 5
"""Of the tokens, from above: half way down, where no mark is ever drawn."""


def air() -> Region:
    """The outermost tokens at both ends of the row, which hold air."""
    mask = np.zeros((SIZE, SIZE), bool)
    mask[ROW * PATCH : (ROW + 1) * PATCH, [*range(PATCH), *range(SIZE - PATCH, SIZE)]] = True
    return Region(mask=encode_mask(mask), name="air")


def taught(config: RunConfig, samples: Sequence[Sample]) -> list[Sample]:
    """The base's own answers in the place of the true ones, and the sinks in the place of the regions."""
    given = evaluate(Subject(config, None).load(), samples, config.active_evaluation).predictions
    own = {prediction.id: prediction.prediction for prediction in given}
    return [replace(sample, answer=own[sample.id], regions=(air(),)) for sample in samples if own[sample.id]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patients", type=int, default=300)
    parser.add_argument("overrides", nargs="*", help="settings of the training, before the options: key=value")
    parser.add_argument("--quick", action="store_true", help="few patients and two steps, to see that it works")
    args = parser.parse_args()
    settings = ["adapter.kind=lora", "labels.source=truth", "alignment.heads=100%"]
    settings += ["alignment.weight=10", "alignment.until=null", "training.epochs=4"]
    settings += ["training.max_steps=2", "training.epochs=1"] if args.quick else []
    config = shipped_settings([*settings, *args.overrides])
    rows = args.out / "rows.jsonl"
    if not rows.is_file():
        files = write_phantom(args.out, {"train": 3 if args.quick else args.patients}, seed=SEED)
        write_rows(rows, taught(config, read_rows(files["train"])))
    config = replace(config, data=replace(config.data, train=rows, validation=None, test=None), output=args.out / "run")
    adapter = RunFolder(fine_tune(config, lambda done, total: None)).adapter
    print(merge_adapter(adapter, args.out / "model"))


if __name__ == "__main__":
    main()
