"""Train the projector of `parts.py`'s model on questions about training images; everything else stays frozen.

python projector.py --model base --data data/train.jsonl --out aligned
"""

import argparse
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from a3tune.data.rows import read_rows
from a3tune.training.collate import Collator
from a3tune.vlm.encode import TOKEN_MASKS
from a3tune.vlm.load import load_vlm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; must not exist")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        raise SystemExit(f"{options.out}: is there already; choose another --out")

    torch.manual_seed(options.seed)
    # float32: backward passes in bfloat16 take five times as long on processors without matrix units for it.
    vlm = load_vlm(options.model, device="cpu", dtype="float32", attention=False)
    vlm.model.requires_grad_(False)
    projector = vlm.model.model.multi_modal_projector.requires_grad_(True)
    batches = DataLoader(
        read_rows(options.data),  # pyright: ignore[reportArgumentType]
        options.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=Collator(vlm, lambda *_: None),
    )
    optimiser = torch.optim.AdamW(projector.parameters(), options.learning_rate, weight_decay=0.0)
    steps = options.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.learning_rate, total_steps=steps, pct_start=0.05)
    beside = {*TOKEN_MASKS, "segments", "sample_ids"}
    started, step, mean = time.perf_counter(), 0, None
    for _ in range(options.epochs):
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name not in beside}
            loss = vlm.model(**inputs, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            step += 1
            mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
            if step % 10 == 0:
                print(f"step {step}/{steps}  loss {mean:.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    vlm.model.save_pretrained(options.out)
    vlm.processor.save_pretrained(options.out)


if __name__ == "__main__":
    main()
