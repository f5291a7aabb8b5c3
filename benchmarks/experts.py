"""The stacked A3MoE layer against the looped form: forward and backward of one query and one key matrix.

    python benchmarks/experts.py [--quick] [--batch 1 4] [--out FILE]

Mistral-7B's widths, 576 image tokens and up to 100 of text, bfloat16 autocast over fp32 experts, as in training. Only
what the adapter adds is timed: the frozen product is the same on all sides. Sides: `stacked` (`adapters/experts.py`),
`looped` (`published.py`), and `lora` (one plain LoRA matrix of rank 64) for scale. Weights are the same, and so are the
results, which is checked in fp32 before anything is timed.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from measure import about, listed, table, take_turns, write
from published import LoopedKey, LoopedQuery, Positions
from step_cost import EXPERT_ALPHA, EXPERTS, QUICK, Shape, make_batch, positions
from torch import Tensor, nn

from a3tune.adapters import KeyExperts, QueryExperts
from a3tune.machine.threads import choose_threads

Delta = Callable[[Tensor], Tensor]


class Zero(nn.Linear):
    """In place of the frozen matrix: so that a looped layer returns its experts' part alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def sides(shape: Shape, size: int, matrix: str) -> dict[str, Delta]:
    """What each form adds to the projection of x [B, S, D], with the same random weights."""
    width, key_width = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    batch, where = make_batch(shape, size), positions(shape, size)
    shared = {"rank": EXPERTS["expert_rank"], "alpha": EXPERT_ALPHA, "router_hidden": EXPERTS["router_hidden"]}
    query, top = matrix == "query", EXPERTS["top_experts"]
    out, count = (width, EXPERTS["query_experts"]) if query else (key_width, EXPERTS["key_experts"])
    kind: Any = QueryExperts if query else KeyExperts
    stacked = kind(width, out, experts=count, **shared, **({} if query else {"top": top}))
    nn.init.normal_(stacked.B.weight, std=0.02)
    looped = make_looped(query, width, out, where, experts=count, top=top, **shared)
    looped.take(stacked.A.weight, stacked.B.weight, stacked.router)
    lora = nn.Sequential(nn.Linear(width, shape.rank, bias=False), nn.Linear(shape.rank, out, bias=False))
    prompt, image = batch["prompt_mask"], batch["image_mask"]
    ours: Delta = (lambda x: stacked(x, stacked.gate(x, prompt))) if query else (lambda x: stacked(x, image))
    return {"lora": lora, "stacked": ours, "looped": looped}


def make_looped(query: bool, width: int, out: int, where: Positions, *, top: int, **settings: Any) -> Any:
    with torch.device("meta"):
        base = Zero(width, out, bias=False)
    return LoopedQuery(base, where, **settings) if query else LoopedKey(base, where, top=top, **settings)


def passes(delta: Delta, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward; gradients stay where they are, as in accumulation."""

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            result = delta(x)
        result.backward(grad.to(result.dtype))

    return run


def check(forms: Mapping[str, Delta], x: Tensor) -> None:
    """Both forms of the experts give the same result and the same gradient of x, in fp32."""
    found = []
    for name in ("stacked", "looped"):
        leaf = x.detach().float().requires_grad_()
        result = forms[name](leaf)
        result.square().sum().backward()
        found.append((result.detach(), leaf.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny widths, seconds: to see that it works")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    arguments = parser.parse_args()
    choose_threads(1 if arguments.quick else None)
    shape = QUICK if arguments.quick else Shape()
    sizes, repetitions = ([2], 2) if arguments.quick else (arguments.batch, arguments.repetitions)
    results, rows = [], []
    for size in sizes:
        for matrix in ("query", "key"):
            torch.manual_seed(0)
            forms = sides(shape, size, matrix)
            tokens = make_batch(shape, size)["input_ids"].shape[1]
            x = torch.randn(size, tokens, shape.hidden).to(torch.bfloat16).requires_grad_()
            check(forms, x)
            grad = torch.randn_like(forms["stacked"](x.float()).detach())
            costs = take_turns({name: passes(form, x, grad) for name, form in forms.items()}, repetitions)
            results.append({"batch": size, "matrix": matrix, "costs": costs})
            for name, cost in costs.items():
                speed = costs["looped"]["cpu"].median / cost["cpu"].median
                rows.append([size, matrix, name, cost["cpu"], cost["wall"], f"{speed:.2f}"])
    header = ["Batch", "Matrix", "Side", "CPU s", "Wall s", "Times as fast as looped"]
    lines = listed({**about(), **EXPERTS})
    text = "\n".join(["# A3MoE layer", "", *lines, "", "Medians (least to most).", "", table(header, rows)])
    write(arguments.out, {"about": about(), "experts": EXPERTS, "results": results}, text)


if __name__ == "__main__":
    main()
