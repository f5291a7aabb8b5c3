"""Runs the checks of `tests/zoo/checks.py` on a tiny random model of every family and writes docs/families.md.

    python benchmarks/families.py

About two minutes on one processor thread; nothing is downloaded.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from transformers.utils import logging

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from zoo import ZOO  # noqa: E402
from zoo.checks import CHECKS  # noqa: E402

COLUMNS: dict[str, tuple[str, ...]] = {
    "capture equal to eager": (
        "capture equal to eager, padded left",
        "capture equal to eager, padded right",
        "capture with a cache",
    ),
    "geometry round trip": ("geometry round trip",),
    "A3MoE": ("A3MoE", "adapter file"),
    "checkpointing": ("checkpointing", "accumulation"),
    "generate": ("generate",),
    "padding left": ("padding left",),
    "padding right": ("padding right",),
    "tokens and boxes": ("boxes", "token masks", "several images"),
}
"""Column -> its checks; the largest number of them is shown, of the round trip the smallest."""
PAGE = """# Model families

Made by `python benchmarks/families.py` with torch {torch} and transformers {transformers}; the same checks run in
`tests/test_families.py`. Every row is a tiny random model of that family, saved and loaded as its checkpoints are, with
the family's own processor, control tokens and the shape of its chat template.

{table}

- **capture equal to eager**: largest difference between the captured attention (averaged rows on image tokens) and that
  of transformers' eager attention, over a batch padded on the left and one padded on the right, and between a decoding
  step with a KV cache and one pass over everything. Layers with a sliding window included.
- **geometry round trip**: other pixels in the box of one image token change that token most on its way into the
  language model (attention inside the vision tower taken out); the box as a mask goes to that token, and painted back
  overlaps itself by at least this much (IoU).
- **A3MoE**: experts on each `q_proj` and `k_proj` of the language model and nowhere else, each with a gradient; routing
  derived from `input_ids` gives the logits of the batch's own masks, and a saved adapter those of the one that was
  saved (largest difference).
- **checkpointing**: largest difference of any gradient with and without non-reentrant activation checkpointing, and of
  the summed loss of a batch alone and as part of an accumulated one.
- **generate**: greedy answers of a batch with images of three sizes are those of its samples one by one, with an
  adapter.
- **padding**: largest difference of a logit between a sample alone and in a padded batch, with an adapter.
- **tokens and boxes**: as many boxes as image tokens, from 1 x 1 to 200 x 7 pixels; prompt, answer, image and control
  tokens share out every position; two images in one prompt.

Not supported: `mllama` (its images enter through cross-attention) and language models of type `gemma2` (PaliGemma 2;
they cap attention scores). Loading one says so.

## Add a family

1. Write its boxes function in `src/a3tune/vlm/grids/`: `(config, processor, height, width)` -> float64 `[N, 4]`, one
   row for each image token in order, in pixels of the original image; NaN for a token that shows no place. `resize.py`
   has the arithmetic that processors share. Follow the processor's own rounding, not what it ought to be.
2. Add a line to `FAMILIES` in `src/a3tune/vlm/families.py`. What else may differ is a field of `Family`: which vision
   towers, settings that old processors lack, no chat template, the token type of answers.
3. Add a tiny random model to `tests/zoo/`, with the real special tokens and the shape of the real chat template, and
   its name to `MODELS` of that file.
4. Run `pytest tests/test_families.py -k NAME`, then `python benchmarks/families.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "families.md")
    parser.add_argument("--quick", action="store_true", help="one family, to see that it works; give an --out")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = [["family", *COLUMNS]]
    failed = False
    for name, make in list(ZOO.items())[: 1 if args.quick else None]:
        with TemporaryDirectory() as folder:
            make(Path(folder))
            rows.append([name, *(_cell(Path(folder), checks) for checks in COLUMNS.values())])
        failed |= any("FAILS" in cell for cell in rows[-1])
        print(*rows[-1], sep=" | ", flush=True)
    table = "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
    args.out.write_text(PAGE.format(table=table, torch=torch.__version__, transformers=transformers.__version__))
    sys.exit(int(failed))


def _cell(folder: Path, checks: tuple[str, ...]) -> str:
    found = []
    for check in checks:
        run: Callable[[Path], float] = CHECKS[check]
        try:
            found.append(run(folder))
        except Exception as error:
            print(f"{check}: {error}", file=sys.stderr)
            return f"FAILS: {check}"
    if checks == ("geometry round trip",):
        return f"{found[0]:.2f}"
    return f"{max(found):.0e}" if max(found) else "yes"


if __name__ == "__main__":
    main()
