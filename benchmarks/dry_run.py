"""What `a3tune train --dry-run` says a training takes, beside the memory that it takes.

    python benchmarks/dry_run.py [--quick] [--out FILE]

A LLaVA with random weights (118 million) on the CPU, two steps on phantom scans. Taken: the most resident memory of
the process, less what it had after a training of the tiny model; each training in a process of its own.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import about, listed, peak_memory, table, write

from a3tune.config import RunConfig, load_config
from a3tune.data.phantom import write_phantom
from a3tune.data.rows import read_rows, read_split
from a3tune.labels.truth import truth_labels
from a3tune.training.estimate import estimate_memory
from a3tune.training.train import train
from a3tune.vlm.tiny import random_vlm, tiny_processor, train_tokenizer

PIXELS = 64
SHAPE = {"hidden": 768, "layers": 12, "heads": 12, "kv_heads": 12, "image_size": PIXELS}
SMALL = {"hidden": 64, "layers": 4, "heads": 4, "kv_heads": 2, "image_size": PIXELS}
CASES: Mapping[str, list[str]] = {
    "LoRA, batch 1": ["adapter.kind=lora", "alignment.weight=0", "training.batch_size=1"],
    "A3Tune, batch 1": ["training.batch_size=1"],
    "A3Tune, batch 4": ["training.batch_size=4"],
    "A3Tune, batch 4, activations recomputed": ["training.batch_size=4", "training.activation_checkpointing=true"],
}


def write_model(folder: Path, data: Path, shape: Mapping[str, int]) -> None:
    """A model with random weights, and a tokenizer that knows the data's words."""
    random_vlm(**shape).save_pretrained(folder)
    tokenizer = train_tokenizer([sample.prompt + sample.answer for sample in read_rows(data)])
    tiny_processor(tokenizer, image_size=PIXELS).save_pretrained(folder)


def settings(data: Path, model: str, output: Path, own: list[str]) -> RunConfig:
    shared = ["labels.source=truth", "training.max_steps=2", "model.device=cpu", "training.seed=1"]
    return load_config(None, [f"data.train={data}", f"model.path={model}", f"output={output}", *shared, *own])


def training(config: RunConfig, warm: RunConfig) -> Callable[[], Any]:
    """To be measured, in a process where what every training loads is there already."""
    train(warm, callbacks=())
    return lambda: train(config, callbacks=())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cases with a small model, to see that it works")
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    args = parser.parse_args()
    cases = dict(list(CASES.items())[:2]) if args.quick else CASES
    torch.set_num_threads(2)  # the processes then begin anew: a fork would use again what this one has freed
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = write_phantom(folder / "data", {"train": 4}, seed=1)["train"]
        write_model(folder / "model", data, SMALL if args.quick else SHAPE)
        for number, (name, own) in enumerate(cases.items()):
            config = settings(data, str(folder / "model"), folder / str(number), own)
            said = estimate_memory(config, read_split(config.data, "train"), truth_labels)
            warm = settings(data, "tiny", folder / f"warm-{number}", own)
            warm = replace(warm, training=replace(warm.training, max_steps=1, batch_size=1))
            before, peak = peak_memory(training, config, warm)
            found[name] = {"estimated": said.total / 1e6, "taken": (peak - before) / 1e6}
    rows = [
        [
            name,
            f"{own['estimated']:.0f}",
            f"{own['taken']:.0f}",
            f"{100 * (own['estimated'] / own['taken'] - 1):+.1f} %",
        ]
        for name, own in found.items()
    ]
    text = [
        "# Memory: said by a dry run, and taken",
        "\n".join(listed(about())),
        table(["Training", "Estimated, MB", "Taken, MB", "Difference"], rows),
    ]
    write(args.out, {"about": about(), "megabytes": found}, "\n\n".join(text))


if __name__ == "__main__":
    main()
