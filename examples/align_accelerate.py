"""Attention alignment in a loop with Accelerate: accelerate launch examples/align_accelerate.py --quick --out out"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import get_peft_model

from a3tune import A3MoEConfig, Alignment, read_rows
from a3tune.data.phantom import write_phantom
from a3tune.vlm.load import load_vlm


def main(out: Path, quick: bool) -> list[float]:
    accelerator, history = Accelerator(), []
    rows, vlm = read_rows(write_phantom(out / "scans", {"train": 1})["train"])[:8], load_vlm("tiny")
    model = get_peft_model(vlm.model, A3MoEConfig(r=8)).train()
    align = Alignment(model, vlm.processor, weight=0.3, heads=0.125)
    loader = accelerator.prepare(torch.utils.data.DataLoader(rows, 4, collate_fn=align.collate))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for _ in range(2 if quick else 50):
        batches = list(loader)  # of one optimiser step
        counts, history = align.count(batches), [*history, 0.0]
        for batch in batches:
            loss, _ = align.loss(model, batch, counts)
            accelerator.backward(loss)
            history[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quick", action="store_true")
    print(main(**vars(parser.parse_args())))
