"""Attention alignment in transformers' Trainer: python examples/align_trainer.py --quick --out out"""

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from a3tune import A3MoEConfig, Alignment, AlignmentMixin, read_rows
from a3tune.data.phantom import write_phantom
from a3tune.models import shipped


class MyTrainer(AlignmentMixin, Trainer):
    """Yours, with what you have changed in it."""


def main(out: Path, quick: bool) -> list[float]:
    rows = read_rows(write_phantom(out / "scans", {"train": 1})["train"])[:8]
    processor = AutoProcessor.from_pretrained(shipped("vlm"))
    model = AutoModelForImageTextToText.from_pretrained(shipped("vlm"))
    torch.manual_seed(0)
    model = get_peft_model(model, A3MoEConfig(r=8))
    align = Alignment(model, processor, weight=0.3, heads=0.125)
    steps = {"max_steps": 2 if quick else 50, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    args = TrainingArguments(str(out / "run"), **steps, learning_rate=1e-3, logging_steps=1, report_to="none")
    trainer = MyTrainer(model, args, align.collate, rows, alignment=align)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quick", action="store_true")
    print(main(**vars(parser.parse_args())))
