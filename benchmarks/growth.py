"""How time and memory grow: capture with image tokens and batch, experts, segments, questions, rows, labels read.

    python benchmarks/growth.py [--quick] [--out FILE] [--only NAME ...]

Sizes take turns. An exponent p is that of cost = c * size^p, least squares on logarithms of the medians, with its 95 %
interval; the expected one is the exponent of the operations or bytes counted on paper, fitted at the same sizes.
"""

import argparse
import json
import pickle
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import labels
import numpy as np
import torch
from measure import Spread, about, table, take_turns, write
from scipy.stats import linregress, t
from tensors import peak_bytes
from torch import Tensor, nn
from transformers.utils import logging

from a3tune.adapters.experts import KeyExperts, QueryExperts
from a3tune.attention import capture
from a3tune.config import EvaluationConfig
from a3tune.data.images import content_hash
from a3tune.data.phantom import write_phantom
from a3tune.data.rows import read_rows
from a3tune.evaluation.evaluate import evaluate
from a3tune.evaluation.results import Results
from a3tune.labels.rows import open_table
from a3tune.labels.store import SHARD_IMAGES, LabelStore
from a3tune.labels.stored import StoredSettings, write_settings
from a3tune.types import Sample
from a3tune.vlm.load import load_vlm

HEADS, KEY_HEADS, HEAD_DIM, WIDTH = 32, 8, 128, 4096
"""Of Mistral-7B, the language model of LLaVA-Med v1.5."""
PROMPT, ANSWER = 80, 20
"""Text tokens behind the image; all but the last look at it."""
LOOKUPS = 200


@dataclass(frozen=True)
class Curve:
    """Cost by size."""

    name: str
    size: str
    """What the sizes count."""
    cost: str
    """Which cost, and its unit."""
    sizes: list[int]
    values: list[float]
    expected: float
    why: str
    spreads: list[Spread] | None = None
    """Of times, over the repetitions."""

    def exponent(self) -> tuple[float, float, float]:
        """p and its 95 % interval."""
        fit: Any = linregress(np.log(self.sizes), np.log(self.values))
        width = float(t.ppf(0.975, len(self.sizes) - 2)) * fit.stderr
        return float(fit.slope), float(fit.slope - width), float(fit.slope + width)


def power(sizes: Sequence[int], counted: Callable[[int], float]) -> float:
    """The exponent of a cost counted on paper, fitted as a measured one is."""
    return float(np.polyfit(np.log(sizes), np.log([counted(size) for size in sizes]), 1)[0])


def times(
    name: str,
    size: str,
    calls: Mapping[int, Callable[[], object]],
    repeats: int,
    expected: float,
    why: str,
    per: int = 1,
) -> Curve:
    """Processor time by size, of one of `per` things that a call does."""
    sides = {str(number): call for number, call in calls.items()}
    found = take_turns(sides, repeats, warmups=min(1, repeats - 1))
    cpu = [found[str(number)]["cpu"] for number in calls]
    spreads = [Spread(own.median / per, own.least / per, own.most / per) for own in cpu]
    return Curve(name, size, "s", list(calls), [own.median for own in spreads], expected, why, spreads)


def captured(tokens: int, batch: int) -> Callable[[], None]:
    """Forward and backward of our capture of one layer, without the SDPA that runs anyway."""
    query, key, image = _layer(tokens, batch)
    none = torch.zeros_like(image)
    prompt, answer = none.clone(), none.clone()
    prompt[:, tokens : tokens + PROMPT] = True
    answer[:, tokens + PROMPT :] = True
    request = capture.capture_request("after_image", image, prompt, answer)

    def call() -> None:
        _, packed = capture.attention_forward(nn.Identity(), query, key, key, None, scaling=1.0, capture=request)
        assert packed is not None
        torch.autograd.grad(packed.sum(), (query, key))

    return call


def eager(tokens: int, batch: int) -> Callable[[], None]:
    """The same averages out of the whole T x T map, as eager attention keeps it: softmax in fp32, then bf16."""
    query, key, _ = _layer(tokens, batch)
    length = query.shape[2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def call() -> None:
        scores = query @ key.repeat_interleave(HEADS // KEY_HEADS, dim=1).mT * HEAD_DIM**-0.5
        attention = scores.masked_fill(future, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
        average = attention[:, :, tokens:-1, :tokens].mean(2)
        torch.autograd.grad(average.sum(), (query, key))

    return call


def _layer(tokens: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and image mask of one layer in bf16, image first."""
    length = tokens + PROMPT + ANSWER
    query, key = (
        torch.randn(batch, heads, length, HEAD_DIM, dtype=torch.bfloat16).requires_grad_()
        for heads in (HEADS, KEY_HEADS)
    )
    image = torch.zeros(batch, length, dtype=torch.bool)
    image[:, :tokens] = True
    return query, key, image


@contextmanager
def _no_sdpa() -> Iterator[None]:
    """Our attention function without its first half."""
    with patch.object(capture, "sdpa_attention_forward", lambda module, query, *rest, **kwargs: (query, None)):
        yield


def capture_curves(quick: bool) -> list[Curve]:
    many = (16, 32, 64) if quick else (256, 576, 1024, 2048, 4096)
    few = (16, 32, 64) if quick else (256, 400, 576, 784, 1024)
    batches = (1, 2, 3) if quick else (1, 2, 4, 8)
    least, repeats = many[0], 1 if quick else 3
    text = PROMPT + ANSWER
    found = []
    sides = {"capture": (captured, many, 1), "eager T x T map": (eager, few, 2)}
    with _no_sdpa():
        for name, (make, tokens, exponent) in sides.items():
            expected = power([own + text for own in tokens], lambda length, p=exponent: float(length) ** p)
            why = "text rows times T keys" if make is captured else "T rows times T keys"
            tiles = ", beside a tile of fixed size" if make is captured else ""
            lengths = {own + text: make(own, 1) for own in tokens}
            found.append(times(name, "positions T", lengths, repeats, expected, why))
            found.append(_peaks(name, "positions T", lengths, expected, f"{why}{tiles}"))
            batched = {batch: make(least, batch) for batch in batches}
            found.append(times(name, f"batch, T = {least + text}", batched, repeats, 1.0, "each sample alike"))
            found.append(_peaks(name, f"batch, T = {least + text}", batched, 1.0, f"each sample alike{tiles}"))
    return found


def _peaks(name: str, size: str, calls: Mapping[int, Callable[[], None]], expected: float, why: str) -> Curve:
    values = [peak_bytes(call) / 2**20 for call in calls.values()]
    return Curve(name, size, "MiB of tensors", list(calls), values, expected, why)


def expert_curves(quick: bool) -> list[Curve]:
    """Q-MoE on a query matrix and K-MoE on a key matrix, forward and backward, rank 16."""
    width, length, tokens = (64, 12, 8) if quick else (WIDTH, 676, 576)
    counts = (1, 2, 4) if quick else (1, 2, 4, 8, 16, 32)
    rank, router = 16, 64
    x = torch.randn(1, length, width).requires_grad_()
    image = torch.zeros(1, length, dtype=torch.bool)
    image[:, :tokens] = True

    def layer(experts: int) -> Callable[[], None]:
        settings: dict[str, Any] = {"experts": experts, "rank": rank, "alpha": 8.0, "router_hidden": router}
        query = QueryExperts(width, width, **settings)
        key = KeyExperts(width, width // 4, top=min(2, experts), **settings)

        def call() -> None:
            (query(x, query.gate(x, ~image)).sum() + key(x, image).sum()).backward()  # pyright: ignore

        return call

    # Of every token: A and B of both; the router of K-MoE reads every token, that of Q-MoE one mean.
    expected = power(counts, lambda experts: experts * rank * (2 * width + width + width // 4) + width * router)
    calls = {experts: layer(experts) for experts in counts}
    why = "two products of all experts, and a router of fixed size"
    # Of every token, in fp32: three times the width (outputs and the gradient of the input), and r channels per expert
    # in each matrix.
    held = power(counts, lambda experts: 3 * width + 2 * experts * rank)
    return [
        times("A3MoE, q_proj and k_proj", "experts", calls, 1 if quick else 3, expected, why),
        _peaks(
            "A3MoE, q_proj and k_proj", "experts", calls, held, "r channels per expert beside outputs of fixed width"
        ),
    ]


def label_curves(quick: bool) -> list[Curve]:
    samples = labels.phantoms(1 if quick else 3)
    segments = (4, 8, 16) if quick else (8, 16, 32, 64)
    calls = {count: partial(labels.measure, samples, count, 1) for count in segments}
    why = "between 0 (superpixels of the image) and 1 (each segment is embedded)"
    return [times("labelling", "segments M", calls, 1 if quick else 3, 1.0, why)]


def evaluation_curves(quick: bool) -> list[Curve]:
    counts = (2, 3, 4) if quick else (16, 32, 64, 128)
    vlm = load_vlm("tiny", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        samples = read_rows(write_phantom(Path(folder), {"test": 1 if quick else 20})["test"])

        def asked(count: int) -> Results:
            return evaluate(vlm, samples[:count], EvaluationConfig(max_new_tokens=2 if quick else 8))

        calls = {count: partial(asked, count) for count in counts}
        kept = [len(pickle.dumps(asked(count))) / 2**10 for count in counts]
        return [
            times("evaluation", "questions", calls, 1 if quick else 3, 1.0, "batches of 16 alike"),
            Curve(
                "evaluation: what Results keep", "questions", "KiB", list(counts), kept, 1.0, "one map and answer each"
            ),
        ]


def row_curves(quick: bool) -> list[Curve]:
    counts = (10, 20, 40) if quick else (1_000, 3_162, 10_000, 31_623, 100_000)
    with tempfile.TemporaryDirectory() as folder:
        paths = {count: Path(folder) / f"{count}.jsonl" for count in counts}
        for count, path in paths.items():
            with path.open("w", encoding="utf-8") as file:
                file.writelines(_row(number) for number in range(count))
        calls = {count: partial(read_rows, path) for count, path in paths.items()}
        return [
            times("reading rows", "rows", calls, 1 if quick else 3, 1.0, "each row alike"),
            Curve(
                "rows in memory", "rows", "MiB", list(counts), [_held(call) for call in calls.values()], 1.0, "as above"
            ),
        ]


def _row(number: int) -> str:
    meta = {"modality": "CT", "organ": "liver", "patient": f"p{number // 4}"}
    row = {"id": f"q{number}", "image": f"images/{number // 4}.png", "prompt": f"Is there a lesion in slice {number}?"}
    return json.dumps(row | {"answer": "yes", "regions": [{"box": [10, 20, 30, 40]}], "meta": meta}) + "\n"


def _held(call: Callable[[], object]) -> float:
    """MiB that the result keeps."""
    tracemalloc.start()
    kept = call()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return held / 2**20


def store_curves(quick: bool) -> list[Curve]:
    """Label stores of 16 segments per image: opening one, and reading labels in random order."""
    counts = (8, 16, 32) if quick else (256, 1_024, 4_096, 16_384)
    with tempfile.TemporaryDirectory() as folder:
        stores = {count: Path(folder) / str(count) for count in counts}
        samples = {count: _fill(path, count) for count, path in stores.items()}
        opening = {count: partial(LabelStore, path) for count, path in stores.items()}
        order = np.random.default_rng(0)

        def look(store: LabelStore, own: Sequence[Sample]) -> None:
            for number in order.integers(len(own), size=LOOKUPS):
                store.labels(own[number])

        reading = {count: partial(look, LabelStore(path), samples[count]) for count, path in stores.items()}
        repeats = 1 if quick else 3
        return [
            times("label store: opening", "images", opening, repeats, 1.0, "reads all keys"),
            times(
                "label store: labels of one question",
                "images",
                reading,
                repeats,
                0.0,
                "a key says where; past 64 shards one is read",
                LOOKUPS,
            ),
        ]


def _fill(folder: Path, count: int) -> list[Sample]:
    """A store of noise with the shapes of a real one, and the samples that it holds."""
    segments = 16
    sample = Sample("", b"", "Where is the lesion?", "here", "open")
    samples = [replace(sample, id=str(number), image=f"image {number}".encode()) for number in range(count)]
    settings = StoredSettings("a", "b", "{question}", {}, {})
    tables = {name: open_table(folder, name, settings) for name in ("segments", "similarities")}
    noise = np.random.default_rng(0)
    for number, own in enumerate(samples, 1):
        image = content_hash(own.image)
        counts = ["".join(map(chr, noise.integers(48, 111, size=120))) for _ in range(segments)]
        tables["segments"].add(
            {"image": image, "height": 512, "width": 512, "counts": counts, "scores": [1.0] * segments}
        )
        tables["similarities"].add({"image": image, "query": own.prompt, "similarity": noise.random(segments).tolist()})
        if number % SHARD_IMAGES == 0 or number == count:
            for own_table in tables.values():
                own_table.write()
    write_settings(folder, settings)
    return samples


PARTS: dict[str, Callable[[bool], list[Curve]]] = {
    "capture": capture_curves,
    "experts": expert_curves,
    "store": store_curves,
    "rows": row_curves,
    "evaluation": evaluation_curves,
    "labels": label_curves,
}


def markdown(curves: Sequence[Curve]) -> str:
    """The exponents, then the costs that they were fitted to."""
    rows = []
    for curve in curves:
        value, low, high = curve.exponent()
        measured = f"{value:.2f} ({low:.2f} to {high:.2f})"
        rows.append([curve.name, curve.size, curve.cost, measured, f"{curve.expected:.2f}", curve.why])
    parts = [table(["What", "Grows with", "Cost", "Exponent", "Expected", "Because"], rows), "## Costs"]
    for curve in curves:
        shown = curve.spreads or [f"{value:.3g}" for value in curve.values]
        cells = ", ".join(f"{size:,}: {value}" for size, value in zip(curve.sizes, shown, strict=True))
        parts.append(f"**{curve.name}**, {curve.cost} by {curve.size}: {cells}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="very small sizes, once each, to see that it works")
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some parts")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    curves: list[Curve] = []
    for name in args.only:
        curves += PARTS[name](args.quick)
        lines = "\n".join(f"- {key}: {value}" for key, value in about().items())
        text = f"# Growth\n\n{lines}\n\nTimes are processor seconds: medians, with the extremes in brackets.\n\n"
        write(args.out, {"about": about(), "curves": curves}, text + markdown(curves))


if __name__ == "__main__":
    main()
