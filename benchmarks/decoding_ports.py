"""Every decoding method and variant against a port of its published code, token by token: how many prompts agree.

    python benchmarks/decoding_ports.py --out docs/results/decoding_ports
    python benchmarks/decoding_ports.py --only opera --out /tmp/opera

Twenty prompts of different lengths, in one padded batch here and one by one there, on a random LLaVA of eight layers
with grouped-query attention, in float64. The ports (`tests/ports/`) read everything again at each step, with eager
attention, and share no decoding code with the library; they were written from the published code, and read nothing of
it. Where a method samples, both take the most likely token: what is compared is its scores. OPERA's two searches must
also have gone back equally often. About ten minutes.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
import torch
from transformers.utils import logging

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from a3tune.attention.capture import use_capture  # noqa: E402
from a3tune.data.phantom.questions import TEMPLATES  # noqa: E402
from a3tune.decoding import generate, make_decoder  # noqa: E402
from a3tune.decoding.opera import Opera  # noqa: E402
from a3tune.decoding.strategy import Strategy, end_tokens  # noqa: E402
from a3tune.vlm.encode import TOKEN_MASKS, encode, prepare  # noqa: E402
from a3tune.vlm.load import Vlm  # noqa: E402
from decoders import counted_returns, deep_vlm  # noqa: E402
from ports.llava import PORTS, Port  # noqa: E402
from ports.opera import Slow  # noqa: E402
from zoo.checks import SIZES, noise  # noqa: E402

TEXTS = [text for templates in TEMPLATES.values() for text in templates]
BEAMS = 5


@dataclass(frozen=True)
class Case:
    """A method with settings; the published ones where nothing is said."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: int = 12
    """Longest answer."""
    note: str = ""


RESTLESS = {"scale": 200.0, "threshold": 2, "initial_tokens": 1}
FLOORED = {"scale": 1000.0, "threshold": 2, "candidates": 3, "initial_tokens": 2}
CASES = (
    Case("greedy"),
    Case("vcd"),
    Case("dola"),
    Case("dola", {"variant": "paper"}),
    Case("opera"),
    Case("opera", {"variant": "paper"}),
    Case("opera", RESTLESS, note="goes back early"),
    Case("opera", RESTLESS | {"variant": "paper"}, note="goes back early"),
    Case("opera", FLOORED, note="equal scores: published code takes any, both here the first"),
    Case("opera", FLOORED | {"variant": "paper"}, note="equal scores"),
    Case("avisc"),
    Case("avisc", {"selector": "std"}),
    Case("m3id"),
    Case("m3id", {"variant": "original"}),
    Case("damro"),
    Case("damro", {"variant": "medheval"}),
    Case("pai"),
    Case("pai", {"variant": "code"}),
    Case("controlmllm", {"learning_rate": 0.05}, note="gentler: random weights have steep gradients"),
    Case("controlmllm", {"learning_rate": 0.01, "accumulate": True}, note="gentler"),
)


def prompts(count: int) -> list[str]:
    return [" ".join(TEXTS[(row + i) % len(TEXTS)] for i in range(1 + row % 4)) for row in range(count)]


def said(vlm: Vlm, answer: list[int]) -> list[int]:
    """Without the padding tokens that it ends with: chosen ones cannot be told from those that fill a batch."""
    kept = len(answer)
    while kept and answer[kept - 1] == vlm.tokenizer.pad_token_id:
        kept -= 1
    return answer[:kept]


def compare(vlm: Vlm, case: Case, count: int, searches: dict[int, Slow]) -> dict[str, Any]:
    """How many answers agree, of how many; how many differ from greedy ones; and of OPERA, in how many prompts both
    searches went back, and how often in all. `searches` keeps what OPERA's port has read, for its next case."""
    method = make_decoder(case.method, case.settings)
    images, texts = [noise(*SIZES[row % 6], row) for row in range(count)], prompts(count)
    encoded = encode(vlm, images, texts, padding_side="left")
    inputs = {name: value for name, value in encoded.items() if name not in TOKEN_MASKS}
    regions = torch.zeros(count, vlm.model.config.image_seq_length)
    regions[:, 40:60] = 1
    strategy = Strategy(num_beams=BEAMS) if isinstance(method, Opera) else Strategy()
    with counted_returns() as returns:
        ours = generate(
            vlm, inputs, method, strategy=strategy, max_new_tokens=case.tokens, regions_BN=regions, seed=0
        ).tokens
    plain = generate(vlm, inputs, strategy=strategy, max_new_tokens=case.tokens).tokens
    equal = changed = went_back = times = 0
    for row, (image, text) in enumerate(zip(images, texts, strict=True)):
        asked = prepare(vlm, [image], text)
        as_often = True
        if isinstance(method, Opera):
            vlm.model.set_attn_implementation({"text_config": "eager"})
            slow = searches.setdefault(row, Slow(vlm, asked, BEAMS))
            slow.returns = 0
            search = slow.search_as_published if method.variant == "code" else slow.search
            theirs = search(method, end_tokens(vlm), case.tokens)
            as_often = slow.returns == returns[row]
            went_back += slow.returns > 0 and returns[row] > 0
            times += slow.returns
            use_capture(vlm.model)
        else:
            theirs = PORTS[case.method](Port(vlm, asked, regions[row]), method, case.tokens)
        equal += said(vlm, theirs) == ours[row].tolist() and as_often
        changed += not torch.equal(ours[row], plain[row])
    counts = {"equal": equal, "prompts": count, "differ_from_plain": changed}
    return counts | ({"went_back": went_back, "returns": times} if isinstance(method, Opera) else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a path without suffix: leaves .json and .md")
    parser.add_argument("--quick", action="store_true", help="two prompts, three tokens, to see that it works")
    parser.add_argument("--only", choices=sorted({case.method for case in CASES}), nargs="+", help="these methods")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    vlm = deep_vlm(layers=4 if args.quick else 8, hidden=64)
    vlm.model.double()
    rows, record, searches = [], [], {}
    for case in [case for case in CASES if args.only is None or case.method in args.only]:
        short = Case(case.method, case.settings, 3) if args.quick else case
        found = compare(vlm, short, 2 if args.quick else 20, searches)
        settings = ", ".join(f"{name}={value}" for name, value in case.settings.items())
        equal = f"{found['equal']} of {found['prompts']}"
        went_back = f"{found['went_back']} prompts, {found['returns']} times" if case.method == "opera" else ""
        rows.append([case.method, settings or "published", equal, found["differ_from_plain"], went_back, case.note])
        record.append({"method": case.method, "settings": case.settings} | found)
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    head = ["method", "settings", "equal to the port", "not what greedy or beams say", "went back", "note"]
    about = measure.about()
    text = f"`{about['command']}` on {about['machine']}, torch {about['torch']}.\n\n{measure.table(head, rows)}"
    measure.write(args.out, {"about": about, "cases": record}, text)


if __name__ == "__main__":
    main()
