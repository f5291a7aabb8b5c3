"""Attention alignment in Lightning (pip install lightning): python examples/align_lightning.py --quick --out out"""

import argparse
from pathlib import Path

import lightning
import torch
from peft import get_peft_model

from a3tune import A3MoEConfig, Alignment, load, read_rows
from a3tune.data.phantom import write_phantom


class MyModule(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        vlm, self.history = load("tiny"), []
        self.model = get_peft_model(vlm.model, A3MoEConfig(r=8)).train()
        self.align = Alignment(self.model, vlm.processor, weight=0.3, heads=0.125)

    def training_step(self, batch: dict) -> torch.Tensor:
        losses = self.align.losses(self.model, batch, self.align.count([batch]))  # counted over all processes
        self.log_dict({"loss": losses.total, "loss_llm": losses.llm, "loss_align": losses.align}, prog_bar=True)
        self.history.append(losses.total.item())
        return losses.total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


def main(out: Path, quick: bool) -> list[float]:
    module, rows = MyModule(), read_rows(write_phantom(out / "scans", {"train": 1})["train"])[:8]
    loader = torch.utils.data.DataLoader(rows, 8, collate_fn=module.align.collate)
    lightning.Trainer(max_steps=2 if quick else 50, log_every_n_steps=1, default_root_dir=out).fit(module, loader)
    return module.history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quick", action="store_true")
    print(main(**vars(parser.parse_args())))
