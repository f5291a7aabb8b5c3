"""The first hour on a GPU: whether everything works there, how fast it is, and how much memory it takes.

    python benchmarks/gpu.py --out FILE [--only SECTION ...] [--quick]

Sections of random weights, no downloads, at most eight minutes together on one card of 80 GB. Each is written to
`FILE.json` and `FILE.md` when it is done; the same command goes on after the last one, `--only` does some again. What
does not run says why, and the rest goes on. `--quick`: tiny widths, also on a processor, where events are wall time.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from device import peak, seconds, tidy, waits, why
from gpu_runs import processes_on_one_card, resumed
from measure import about, listed, table, write
from roofline import DEVICES, LAYERS, Device, parts
from step_cost import QUICK, Shape, Step, base_model, make_step, our_step, positions
from transformers.utils import logging

from a3tune.machine.threads import choose_threads

WHOLE = Shape(layers=32, tower=(24, 1024, 4096, 16))
"""LLaVA-Med 1.5: Mistral-7B and CLIP-L at 336 pixels."""
SIDES = {
    "peft": ("frozen layer, SDPA", "LoRA, rank 64, all layers"),
    "a3tune": (
        "frozen layer, SDPA",
        "LoRA, rank 64, all layers",
        "+ alignment (capture)",
        "+ A3MoE in place of LoRA on q, k",
    ),
    "published": ("frozen layer, SDPA", "LoRA, rank 64, all layers", "published, against LoRA"),
}
"""Sides of `step_cost.py`, with the parts of the roofline that each takes."""
CARDS = {"A100": DEVICES["A100 80 GB"], "H100": DEVICES["H100 SXM"], "H200": Device(989e12, 67e12, 4.8e12)}
"""By a part of the name that torch gives."""
Rows = list[dict[str, Any]]


def versions(quick: bool) -> Rows:
    """What all of it ran on."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"CUDA": torch.version.cuda or "none", "cores": torch.get_num_threads()}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "GB": round(card.total_memory / 1e9, 1), "bf16": torch.cuda.is_bf16_supported()}
        found |= {"TF32": torch.backends.cuda.matmul.allow_tf32, "flash": torch.backends.cuda.flash_sdp_enabled()}
    return [found]


def capture(quick: bool) -> Rows:
    """Captured attention and logits beside those of eager attention, tiny models of every family in half precision."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from zoo import ZOO
    from zoo.checks import capture_beside_eager

    rows = []
    for name, make in list(ZOO.items())[: 2 if quick else None]:
        with TemporaryDirectory() as folder:
            make(Path(folder))
            for dtype in (torch.bfloat16, torch.float16):

                def differences(folder: str = folder, dtype: torch.dtype = dtype) -> dict[str, Any]:
                    sides = [capture_beside_eager(Path(folder), side, _device(), dtype) for side in ("left", "right")]
                    pairs = {
                        "logits": [side[0] for side in sides],
                        "maps": [pair for side in sides for pair in side[1]],
                    }
                    return {what: max(float((a - b).abs().max()) for a, b in own) for what, own in pairs.items()}

                rows.append({"family": name, "dtype": str(dtype).removeprefix("torch.")} | _or_why(differences))
    return rows


def steps(quick: bool) -> Rows:
    """One optimiser step of a whole 7B model."""
    shape, base = _base(quick)
    make = {side: partial(make_step, side, base, shape) for side in SIDES}
    return [_step(side, shape, size, make[side]) for size in _sizes(quick) for side in SIDES]


def checkpointing(quick: bool) -> Rows:
    """The same with activation checkpointing."""
    shape, base = _base(quick)
    make = partial(our_step, "a3tune", base, shape, checkpointing=True)
    return [_step("a3tune, checkpointing", shape, size, make) for size in _sizes(quick)]


def qlora(quick: bool) -> Rows:
    """The same on 4-bit weights of the language model, with activation checkpointing."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    shape, base = _base(quick)
    decoder: Any = base.get_decoder()
    for parent in list(decoder.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear):
                options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
                new = Linear4bit(layer.in_features, layer.out_features, False, torch.bfloat16, device="meta", **options)
                new.weight = Params4bit(layer.weight.detach(), requires_grad=False, **options)
                setattr(parent, name, new.to(base.device))
    base.is_loaded_in_4bit = True  # as transformers says it to PEFT
    make = partial(our_step, "a3tune", base, shape, checkpointing=True)
    return [_step("a3tune, 4 bit, checkpointing", shape, size, make) for size in _sizes(quick)[:2]]


def decoding(quick: bool) -> Rows:
    """Every decoding method on a batch of 8, 32 tokens each, by a LLaVA of 6 billion weights with 576 image tokens."""
    from decoding_cost import Unending, question

    from a3tune.decoding import DECODERS, STRATEGIES, generate

    (size, new), vlm, rows = (2, 3) if quick else (8, 32), _answering(quick), []
    inputs, regions_BN = question(vlm, size)
    for method, decoder in DECODERS.items():

        def tokens(method: str = method, decoder: Any = decoder) -> dict[str, Any]:
            strategy = Unending(**asdict(STRATEGIES[decoder.strategy]))
            ask = partial(generate, vlm, inputs, method, strategy=strategy, max_new_tokens=new, regions_BN=regions_BN)
            ask()
            found = ask()
            return {"tokens/s": size * new / found.seconds, "passes": found.passes}

        rows.append({"method": method, "batch": size} | _or_why(tokens))
    return rows


def _answering(quick: bool) -> Any:
    """A model that answers, made on the device and kept nowhere else."""
    from decoding_cost import QUICK as TINY
    from decoding_cost import TEXTS

    from a3tune.attention.capture import use_capture
    from a3tune.vlm.load import Vlm
    from a3tune.vlm.tiny import IMAGE_SIZE, random_vlm, tiny_processor, train_tokenizer

    large = {"hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "vocab": 32000, "image_size": 288}
    shape = next(iter(TINY.values())) if quick else large
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if _device() == "cpu" else torch.bfloat16)
    try:
        with torch.device(_device()):
            model: Any = random_vlm(**shape).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    processor = tiny_processor(train_tokenizer(TEXTS), image_size=shape.get("image_size", IMAGE_SIZE))
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    use_capture(model)
    return Vlm(model, processor, "random")


def labelling(quick: bool) -> Rows:
    """Images per second of a SAM-B and of BiomedCLIP's image tower (ViT-B/16), 64 pictures an image."""
    import numpy as np
    from PIL import Image
    from transformers import SamConfig, SamModel, ViTConfig, ViTModel

    from a3tune.labels.propose.sam import Sam

    side = 64 if quick else 1024
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_dim": 64,
        "intermediate_size": 64,
    }
    with TemporaryDirectory() as folder:
        vision = {**small, "image_size": 64, "global_attn_indexes": [1], "output_channels": 256} if quick else {}
        prompts = {"image_size": 64, "image_embedding_size": 4} if quick else {}
        SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts)).save_pretrained(folder)
        propose = Sam(weights=Path(folder), points_per_side=4 if quick else 32, min_iou=0.0, min_stability=0.0)
        found = [("SAM-B, 32 x 32 points", seconds(lambda: propose(image), 1 if quick else 3))]
    width = {key: small[key] for key in list(small)[:3]} | {"intermediate_size": 64, "image_size": 32} if quick else {}
    tower = ViTModel(ViTConfig(**width), add_pooling_layer=False).to(_device()).eval()
    pictures = torch.rand(8 if quick else 64, 3, tower.config.image_size, tower.config.image_size, device=_device())
    with torch.inference_mode():
        found.append(("ViT-B/16, 64 pictures, fp32", seconds(lambda: tower(pictures), 2 if quick else 5)))
    return [{"part": name, "seconds": spread, "images/s": 1 / spread.median} for name, spread in found]


def resume(quick: bool) -> Rows:
    """The largest difference between adapters that should be the same: 0 is bitwise."""
    return resumed(_device())


def processes(quick: bool) -> Rows:
    """DDP with two processes on one card, half the batch each, beside one process with the whole."""
    return processes_on_one_card(_device())


SECTIONS: dict[str, Callable[[bool], Rows]] = {
    "versions": versions,
    "capture": capture,
    "steps": steps,
    "checkpointing": checkpointing,
    "qlora": qlora,
    "decoding": decoding,
    "labelling": labelling,
    "resume": resume,
    "processes": processes,
}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _base(quick: bool) -> tuple[Shape, Any]:
    shape = QUICK if quick else WHOLE
    return shape, base_model(shape, _device())


def _sizes(quick: bool) -> tuple[int, ...]:
    return (2,) if quick else (1, 4, 16)


def _step(side: str, shape: Shape, size: int, make: Callable[[int], Step]) -> dict[str, Any]:
    row = {"side": side, "batch": size} | _or_why(lambda: _of_step(side, shape, size, make(size)))
    tidy()
    return row


def _of_step(side: str, shape: Shape, size: int, step: Step) -> dict[str, Any]:
    found: dict[str, Any] = {"first loss": step(), "seconds": seconds(step, 3), "GB": peak(step) / 1e9}
    found["waits"] = waits(step)
    found["tokens/s"] = sum(positions(shape, size).lengths) / found["seconds"].median
    card = next((card for name, card in CARDS.items() if name in _card()), None)
    if card is not None and shape is WHOLE and side in SIDES:
        floor = LAYERS * size * sum(parts(size)[part].seconds(card) for part in SIDES[side])
        found["share of the roofline"] = floor / found["seconds"].median
    return found


def _card() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def _or_why(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why not: one part that does not run must not hide the others."""
    try:
        return measure()
    except Exception as error:
        return {"failed": why(error)}


def markdown(record: Mapping[str, Any]) -> str:
    """A table for each section."""
    lines = ["# On this device", "", *listed(record["about"])]
    for name, section in record["sections"].items():
        rows = section["rows"]
        header = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[_cell(row.get(key)) for key in header] for row in rows]
        said = " ".join((SECTIONS[name].__doc__ or name).split())
        lines += ["", f"## {name}", "", f"{said} {section['took']:.0f} s.", "", table(header, cells)]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):  # a spread, out of a file
        value = value["median"]
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path without suffix for a .json and a .md")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="tiny widths: to see that it works")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    choose_threads(1 if arguments.quick else None)
    file = arguments.out.with_suffix(".json")
    record: dict[str, Any] = {"about": about() | {"quick": str(arguments.quick), "card": _card() or "none"}}
    before = json.loads(file.read_text()) if file.is_file() else {}
    same = all(before.get("about", {}).get(name) == record["about"][name] for name in ("quick", "card", "torch"))
    record["sections"] = before["sections"] if before and same else {}
    for name in arguments.only or [name for name in SECTIONS if name not in record["sections"]]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            rows = SECTIONS[name](arguments.quick)
        except Exception as error:
            rows = [{"failed": why(error)}]
        tidy()
        record["sections"][name] = {
            "took": time.perf_counter() - start,
            "rows": json.loads(json.dumps(rows, default=asdict)),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n")
    record["sections"] = {name: record["sections"][name] for name in SECTIONS if name in record["sections"]}
    write(arguments.out, record, markdown(record))


if __name__ == "__main__":
    main()
