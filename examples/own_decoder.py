"""A decoding method of your own beside the shipped ones, with what each costs (docs/howto/own-decoder.md).

python examples/own_decoder.py --quick --out out
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from a3tune.config import EvaluationConfig
from a3tune.config.ranges import NonNegative, Share
from a3tune.data.phantom import write_phantom
from a3tune.data.rows import read_rows
from a3tune.decoding import DECODERS
from a3tune.decoding.base import Inputs
from a3tune.decoding.contrast import Contrast, contrast, cutoff
from a3tune.decoding.loop import run
from a3tune.evaluation.evaluate import evaluate
from a3tune.vlm.load import Vlm, load_vlm


@dataclass(frozen=True)
class Grey:
    """What the image adds over an image that shows nothing."""

    name: ClassVar[str] = "grey"
    strategy: ClassVar[str] = "greedy"
    alpha: NonNegative = 0.5
    """Weight of the contrast; 0 is greedy decoding."""
    beta: Share = 0.1
    """Cutoff."""

    def check(self, vlm: Vlm) -> None:
        """Any model can do it."""

    def __call__(
        self,
        vlm: Vlm,
        inputs: Inputs,
        config: GenerationConfig,
        *,
        regions_BN: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        grey = inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
        return run(vlm, inputs, config, generator, scorer=Contrast(vlm, grey, self.combine, config))

    def combine(self, with_image_BV: Tensor, without_BV: Tensor, step: int) -> Tensor:
        return cutoff(contrast(with_image_BV, without_BV, self.alpha), with_image_BV, self.beta)


DECODERS["grey"] = Grey


def main(out: Path, quick: bool) -> None:
    samples = read_rows(write_phantom(out / "scans", {"test": 1 if quick else 20})["test"])
    vlm = load_vlm("tiny")
    for name, settings in (("greedy", {}), ("vcd", {}), ("grey", {}), ("grey", {"alpha": 2.0})):
        found = evaluate(vlm, samples, EvaluationConfig(decode=name, decoding=settings, max_new_tokens=16))
        recall, cost = found.metrics["open_recall"].mean, found.cost
        title = f"{name} {settings or ''}"
        print(f"{title:20} open recall {recall:.3f}   {cost.passes} passes, {cost.answer_seconds:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for everything it writes")
    parser.add_argument("--quick", action="store_true", help="one patient")
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
