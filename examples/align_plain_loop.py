"""Attention alignment in a loop of your own: python examples/align_plain_loop.py --quick --out out"""

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from a3tune import A3MoEConfig, Alignment, read_rows
from a3tune.data.phantom import write_phantom
from a3tune.models import shipped


def main(out: Path, quick: bool) -> list[float]:
    rows = read_rows(write_phantom(out / "scans", {"train": 1})["train"])[:8]
    processor, model = (kind.from_pretrained(shipped("vlm")) for kind in (AutoProcessor, AutoModelForImageTextToText))
    torch.manual_seed(0)
    model = get_peft_model(model, A3MoEConfig(r=8)).train()
    align = Alignment(model, processor, weight=0.3, heads=0.125)
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(2 if quick else 50):
        batches = [align.collate(rows[:4]), align.collate(rows[4:])]  # of one optimiser step
        counts, history = align.count(batches), [*history, 0.0]
        for batch in batches:
            loss, _ = align.loss(model, batch, counts)
            loss.backward()
            history[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quick", action="store_true")
    print(main(**vars(parser.parse_args())))
