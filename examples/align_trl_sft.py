"""Attention alignment in TRL's SFTTrainer (pip install trl): python examples/align_trl_sft.py --quick --out out"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from a3tune import A3MoEConfig, Alignment, AlignmentMixin
from a3tune.data.phantom import write_phantom
from a3tune.models import shipped


class MyTrainer(AlignmentMixin, SFTTrainer):
    """Yours, with what you have changed in it."""


def main(out: Path, quick: bool) -> list[float]:
    file = write_phantom(out / "scans", {"train": 1})["train"]
    rows = Dataset.from_json(str(file), cache_dir=str(out / "cache")).select(range(8))
    rows = rows.map(lambda row: {"image": str(file.parent / row["image"])})
    processor = AutoProcessor.from_pretrained(shipped("vlm"))
    model = AutoModelForImageTextToText.from_pretrained(shipped("vlm"))
    align = Alignment(model, processor, weight=0.3, heads=0.125)
    steps = {"max_steps": 2 if quick else 50, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    args = SFTConfig(str(out / "run"), **steps, learning_rate=1e-3, logging_steps=1, bf16=False)
    own = {"processing_class": processor, "peft_config": A3MoEConfig(r=8), "alignment": align}
    trainer = MyTrainer(model, args, align.collate, rows, **own)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quick", action="store_true")
    print(main(**vars(parser.parse_args())))
