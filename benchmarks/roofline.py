"""What a training step must cost on paper, on graphics processors that nothing here was measured on.

    python benchmarks/roofline.py [--out FILE]

FLOPs, bytes moved and bytes kept for the backward pass, per layer and sample, of a Mistral-7B with LoRA of rank 64, and
what alignment, A3MoE and the published way add or take away. Time is the larger of arithmetic and memory traffic at
full speed of the device, summed over the parts: a bound from below that no program reaches. Nothing is run.

Below it the hours of Table 1's trainings at half that speed, on cards that a reader may have.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import yaml
from measure import about, table, write

from a3tune.reproduce.experiments import experiments, paper_asset

LAYERS, HIDDEN, INNER, HEADS, KEY_WIDTH = 32, 4096, 14336, 32, 1024
TOKENS, ROWS, IMAGE = 676, 94, 576
"""Of a sample: all, text rows after the image, image tokens."""
RANK, EXPERT_RANK, QUERY_EXPERTS, KEY_EXPERTS, TOP, ROUTER = 64, 16, 8, 16, 3, 64
HALF, FULL = 2, 4
"""Bytes of a bfloat16 and of an fp32 number."""
LINEARS = [
    (HIDDEN, HIDDEN),
    (HIDDEN, KEY_WIDTH),
    (HIDDEN, KEY_WIDTH),
    (HIDDEN, HIDDEN),
    *[(HIDDEN, INNER)] * 2,
    (INNER, HIDDEN),
]
"""Inputs and outputs of q, k, v, o, gate, up and down."""


@dataclass(frozen=True)
class Device:
    half: float
    """FLOP/s in bfloat16 with fp32 sums, dense."""
    full: float
    """FLOP/s in fp32, without TF32."""
    bandwidth: float
    """Bytes/s of memory."""


DEVICES = {"A100 80 GB": Device(312e12, 19.5e12, 2.04e12), "H100 SXM": Device(989e12, 67e12, 3.35e12)}

RTX_4090 = Device(165e12, 82.6e12, 1.01e12)
REACHED, REPLAYED = 0.5, 1.5
"""Share of the bound that a good step reaches; what activation checkpointing makes of the time of frozen layers."""


@dataclass(frozen=True)
class Part:
    """Cost of one layer and sample, forward and backward."""

    half: float = 0.0
    """FLOPs in bfloat16."""
    full: float = 0.0
    """FLOPs in fp32."""
    moved: float = 0.0
    """Bytes to and from memory."""
    kept: float = 0.0
    """Bytes kept from forward to backward."""

    def __sub__(self, other: "Part") -> "Part":
        return Part(self.half - other.half, self.full - other.full, self.moved - other.moved, self.kept - other.kept)

    def seconds(self, device: Device) -> float:
        """At best. A part that takes work away has a negative time."""
        arithmetic = self.half / device.half + self.full / device.full
        return max(arithmetic, self.moved / device.bandwidth, key=abs)


def frozen(batch: int) -> Part:
    """The layer without adapters, SDPA: no gradients of weights. Its weights are read twice per batch, not per sample.

    Kept: inputs of both norms and of all adapted layers, queries, keys, values, output of the attention, both factors
    of the gated product.
    """
    weights = sum(a * b for a, b in LINEARS)
    attention = 7 * TOKENS**2 * HIDDEN  # causal: half of 4 forward and 10 backward
    outputs = sum(b for _, b in LINEARS)
    elementwise = 12 * HIDDEN + 3 * INNER + 2 * (HIDDEN + 2 * KEY_WIDTH)
    moved = 2 * HALF * weights / batch + 3 * HALF * TOKENS * (sum(a + b for a, b in LINEARS) + elementwise)
    kept = HALF * TOKENS * (2 * HIDDEN + 2 * HIDDEN + outputs + HIDDEN + INNER)
    return Part(4 * weights * TOKENS + attention, moved=moved, kept=kept)


def low_rank(pairs: list[tuple[int, int, int]]) -> Part:
    """LoRA of (inputs, outputs, rank): forward and both gradients; reads x and its gradient, adds to the output."""
    weights = sum(rank * (a + b) for a, b, rank in pairs)
    moved = HALF * TOKENS * sum(4 * a + 5 * b + 6 * rank for a, b, rank in pairs)
    return Part(6 * weights * TOKENS, moved=moved, kept=HALF * TOKENS * sum(rank for _, _, rank in pairs))


def capture() -> Part:
    """Scores of the text rows in fp32, twice (they are computed again), and two products of the backward pass in half.

    A score passes through memory 6 times forward and about 12 times backward. Kept: the maps, and the keys before they
    are repeated.
    """
    scores = HEADS * ROWS * TOKENS
    product = 2 * ROWS * TOKENS * HIDDEN
    gradients = HALF * TOKENS * 3 * (HIDDEN + KEY_WIDTH)
    kept = FULL * HEADS * (IMAGE + 1) + HALF * TOKENS * KEY_WIDTH
    return Part(2 * product, 2 * product, 18 * FULL * scores + gradients, kept)


def experts() -> Part:
    """Q-MoE and K-MoE, stacked, in place of LoRA on queries and keys; K-MoE's router reads every token."""
    query, key = QUERY_EXPERTS * EXPERT_RANK, KEY_EXPERTS * EXPERT_RANK
    stacked = low_rank([(HIDDEN, HIDDEN, query), (HIDDEN, KEY_WIDTH, key), (HIDDEN, 0, ROUTER)])
    gated = HALF * TOKENS * (query + key)
    return Part(stacked.half, 0.0, stacked.moved + 3 * gated, stacked.kept + gated) - low_rank(
        [(HIDDEN, HIDDEN, RANK), (HIDDEN, KEY_WIDTH, RANK)]
    )


def published() -> Part:
    """Eager attention with its maps, and experts in loops, in place of SDPA, capture and stacked experts.

    A score passes through memory about 9 times forward and 10 times backward; kept are the fp32 softmax and its copy in
    half precision. Each query expert's output is written, weighed and added, and kept for the gate's gradient.
    """
    scores = HEADS * TOKENS**2
    eager = 5 * TOKENS**2 * HIDDEN  # nothing is saved by causality, nothing is computed again
    output = HALF * TOKENS * HIDDEN
    loops = QUERY_EXPERTS * 8 * output + KEY_EXPERTS * 5 * HALF * IMAGE * TOP / KEY_EXPERTS * (HIDDEN + KEY_WIDTH)
    kept = (FULL + HALF) * scores + QUERY_EXPERTS * output
    return Part(eager, 0.0, 19 * HALF * scores + loops, kept)


def parts(batch: int) -> dict[str, Part]:
    """By name, in the order of the table."""
    return {
        "frozen layer, SDPA": frozen(batch),
        "LoRA, rank 64, all layers": low_rank([(a, b, RANK) for a, b in LINEARS]),
        "+ alignment (capture)": capture(),
        "+ A3MoE in place of LoRA on q, k": experts(),
        "published, against LoRA": published(),
    }


def hours(batch: int) -> list[list[str]]:
    """Rows of a table: a data set of Table 1, samples of one training, and hours of both on each card."""
    epochs = {
        name: next(int(setting.partition("=")[2]) for setting in settings if setting.startswith("training.epochs="))
        for name, settings in yaml.safe_load(paper_asset("settings.yaml"))["data"].items()
    }
    known = experiments()
    counts = dict(zip((column.data for column in known["table6"].columns), known["table6"].rows[0].paper, strict=True))
    rows, sums = [], [0.0] * 4
    for data in dict.fromkeys(column.data for column in known["table1"].columns):
        samples = int(counts[data] or 0) * epochs[data]
        one = DEVICES["A100 80 GB"]
        cards = [_seconds(RTX_4090, batch, REPLAYED), _seconds(one, batch), _seconds(one, batch) / 4]
        found = [samples, *(samples * seconds / 3600 for seconds in cards)]
        sums = [a + b for a, b in zip(sums, found, strict=True)]
        rows.append([data, f"{counts[data]:,} x {epochs[data]}", *(f"{value:.1f}" for value in found[1:])])
    return [*rows, ["all", f"{int(sums[0]):,}", *(f"{value:.1f}" for value in sums[1:])]]


def _seconds(device: Device, batch: int, replayed: float = 1.0) -> float:
    """Of a sample in both trainings, LoRA's and A3Tune's."""
    base, lora, *ours = list(parts(batch).values())[:4]
    both = 2 * (replayed * base.seconds(device) + lora.seconds(device)) + sum(part.seconds(device) for part in ours)
    return LAYERS * both / REACHED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="samples that share one reading of the weights")
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    arguments = parser.parse_args()
    found = parts(arguments.batch)
    floor = list(found.values())[:2]
    rows = []
    for name, part in found.items():
        times = []
        for device in DEVICES.values():
            seconds = part.seconds(device)
            share = seconds / sum(own.seconds(device) for own in floor)
            times.append(f"{1e3 * LAYERS * seconds:.2f} ({100 * share:.1f} %)")
        flops = [f"{(part.half + part.full) / 1e9:.2f}", f"{part.full / 1e9:.2f}"]
        kept = [f"{part.kept / 1e6:.1f}", f"{LAYERS * part.kept / 1e9:.2f}"]
        rows.append([name, *flops, f"{part.moved / 1e6:.0f}", *kept, *times])
    header = ["Part", "GFLOP", "of it fp32", "MB moved", "MB kept", "GB kept, 32 layers"]
    header += [f"{name}: ms per sample (of LoRA's step)" for name in DEVICES]
    command = about()["command"]
    record = {
        "about": {"command": command},
        "batch": arguments.batch,
        "devices": DEVICES,
        "parts": found,
        "hours": hours(arguments.batch),
    }
    text = ["# Roofline", "", f"- command: {command}", "- computed, not measured", "", table(header, rows)]
    cards = ["RTX 4090, 24 GB, 4 bit, checkpointing", "A100 80 GB", "four A100 80 GB"]
    text += ["", "Hours of Table 1's trainings, LoRA and A3Tune, at half of that speed; answers come on top.", ""]
    text.append(table(["Data set", "Rows x epochs", *cards], record["hours"]))
    write(arguments.out, record, "\n".join(text))


if __name__ == "__main__":
    main()
