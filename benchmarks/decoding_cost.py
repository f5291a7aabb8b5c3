"""What each decoding method costs beside greedy decoding: time to the first token, time per token, passes, memory.

    python benchmarks/decoding_cost.py [--quick] [--out FILE]

Models of random weights, one prompt at a time, answers of a fixed number of tokens (no token ends them), methods in
turns. Settings are the published ones. How often OPERA goes back depends on the model's attention; passes tell.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import Spread, about, listed, table, take_turns, write
from PIL import Image
from tensors import peak_bytes
from transformers import GenerationConfig
from transformers.utils import logging

from a3tune.data.phantom.questions import TEMPLATES
from a3tune.decoding import DECODERS, STRATEGIES, Strategy, generate
from a3tune.vlm.encode import TOKEN_MASKS, encode
from a3tune.vlm.load import Vlm, load_vlm
from a3tune.vlm.tiny import random_vlm, tiny_processor, train_tokenizer

REFERENCE = "greedy"
QUESTION = "Is there a lesion in the liver, and on which side of the image is it?"
TEXTS = [text for templates in TEMPLATES.values() for text in templates]
WIDE = {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4, "vocab": 32000}
SHAPES: dict[str, dict[str, int]] = {
    "4 layers of 128, 100 image tokens": {},
    "8 layers of 512, 100 image tokens": WIDE,
    "8 layers of 512, 576 image tokens": WIDE | {"image_size": 288},
}
QUICK = {"2 layers of 32": {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2}}
EXPECTED = {
    "sampling": "1 pass per token",
    "greedy": "1 pass per token",
    "beam": "1 pass of 5 rows per token; 5 caches, reordered at each",
    "nucleus": "1 pass per token; sorts the vocabulary",
    "vcd": "2 passes per token; 2 caches; images encoded twice",
    "dola": "1 pass per token; the head reads 8 more layers",
    "opera": "2 passes of 5 rows per token, one of them 5 tokens wide; 5 caches",
    "avisc": "2 passes per token; the prompt is read 3 times",
    "m3id": "2 passes per token, the second over a prompt without image",
    "damro": "2 passes per token, the second over a prompt with 10 image tokens",
    "pai": "2 passes per token, the second over a prompt without image",
    "controlmllm": "1 pass per token; before, 5 forward and backward passes over the prompt",
}


@dataclass(frozen=True)
class Row:
    """One method on one prompt; times are processor seconds, relative ones ratios of medians."""

    model: str
    prompt_tokens: int
    method: str
    passes: int
    whole: Spread
    """Seconds of the whole answer."""
    first: Spread
    """Of one that ends after its first token."""
    token: float
    """Of each later token."""
    peak_bytes: int
    """Of tensors beyond the weights."""


class Unending(Strategy):
    """A strategy whose answers no token ends."""

    def config(self, vlm: Vlm, max_new_tokens: int) -> GenerationConfig:
        config = super().config(vlm, max_new_tokens)
        config.eos_token_id = [vlm.model.config.text_config.vocab_size]
        return config


def models(shapes: Mapping[str, Mapping[str, int]], folder: Path) -> dict[str, Vlm]:
    """Random models, loaded as users load theirs."""
    found = {}
    for name, shape in shapes.items():
        random_vlm(**shape).save_pretrained(folder / name)
        size = {"image_size": shape["image_size"]} if "image_size" in shape else {}
        tiny_processor(train_tokenizer(TEXTS), **size).save_pretrained(folder / name)
        found[name] = load_vlm(folder / name, device="cpu")
    return found


def question(vlm: Vlm, size: int = 1) -> tuple[dict[str, Any], torch.Tensor]:
    """Inputs of so many pictures with a question each, and the quarter of the image tokens that is the region."""
    side = vlm.model.config.vision_config.image_size
    picture = Image.effect_noise((side, side), 60).convert("RGB")
    encoded = encode(vlm, [picture] * size, [QUESTION] * size).to(vlm.device, vlm.model.dtype)
    tokens = int(encoded["image_mask"][0].sum())
    inputs = {name: value for name, value in encoded.items() if name not in TOKEN_MASKS}
    return inputs, (torch.arange(tokens, device=vlm.device) < tokens // 4).expand(size, -1)


def compare(name: str, vlm: Vlm, new: int, repeats: int) -> list[Row]:
    """All methods on one prompt."""
    inputs, regions_BN = question(vlm)
    passes: dict[tuple[str, int], int] = {}

    def answer(method: str, tokens: int) -> None:
        strategy = Unending(**asdict(STRATEGIES[DECODERS[method].strategy]))
        found = generate(vlm, inputs, method, strategy=strategy, max_new_tokens=tokens, regions_BN=regions_BN)
        passes[method, tokens] = found.passes

    sides: dict[str, Callable[[], object]] = {}
    for method in DECODERS:
        sides[f"{method} 1"] = partial(answer, method, 1)
        sides[method] = partial(answer, method, new)
    print(f"{name} ...", flush=True)
    spreads = take_turns(sides, repeats, warmups=0)
    rows = []
    for method in DECODERS:
        whole, first = spreads[method]["cpu"], spreads[f"{method} 1"]["cpu"]
        rows.append(
            Row(
                model=name,
                prompt_tokens=inputs["input_ids"].shape[1],
                method=method,
                passes=passes[method, new],
                whole=whole,
                first=first,
                token=(whole.median - first.median) / (new - 1),
                peak_bytes=peak_bytes(partial(answer, method, new)),
            )
        )
    return rows


def markdown(rows: list[Row], new: int) -> str:
    """A table for each model and prompt."""
    parts = []
    for model, prompt in dict.fromkeys((row.model, row.prompt_tokens) for row in rows):
        own = {row.method: row for row in rows if (row.model, row.prompt_tokens) == (model, prompt)}
        greedy = own[REFERENCE]
        header = ["Method", "Passes", "Time", "First token", "Each later one", "Tokens/s", "Peak memory", "Expected"]
        cells = [
            [
                row.method,
                row.passes,
                "{:.2f}x ({:.2f} to {:.2f})".format(
                    *(value / greedy.whole.median for value in (row.whole.median, row.whole.least, row.whole.most))
                ),
                f"{row.first.median / greedy.first.median:.2f}x",
                f"{row.token / greedy.token:.2f}x",
                f"{1 / row.token:.0f}",
                f"{row.peak_bytes / 2**20:.1f} MiB",
                EXPECTED[row.method],
            ]
            for row in own.values()
        ]
        parts.append(
            f"## {model}: prompt of {prompt} tokens, {new} new ones\n\n{table(header, cells)}\n\n"
            f"Greedy: {1000 * greedy.first.median:.0f} ms to the first token.\n"
        )
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a very small model and 3 tokens, to see that it works")
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    new, repeats = (3, 1) if args.quick else (16, 3)
    with TemporaryDirectory() as folder:
        rows = [
            row
            for name, vlm in models(QUICK if args.quick else SHAPES, Path(folder)).items()
            for row in compare(name, vlm, new, repeats)
        ]
    text = [
        "# Cost of the decoding methods",
        "\n".join(listed(about())),
        f"Processor time relative to greedy decoding: medians of {repeats} rounds, in brackets the extremes. Passes are"
        " those of the language model. Memory is that of tensors beyond the weights.",
        markdown(rows, new),
    ]
    write(args.out, {"about": about(), "rows": rows}, "\n\n".join(text))


if __name__ == "__main__":
    main()
