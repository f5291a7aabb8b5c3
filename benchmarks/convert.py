"""Memory and time of converting a checkpoint of 7 billion parameters.

    python benchmarks/convert.py --out /somewhere/with/30/GB

Writes random numbers in the layout and shapes of LLaVA-Med v1.5, in shards of up to 5 GB as published, converts them in
a process of its own, prints its peak memory, and deletes both. `--quick` takes narrow layers instead.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import BinaryIO

import torch
from tokenizers import Tokenizer, models

from a3tune.convert import convert

FULL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
QUICK = FULL | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
QUICK_TOWER = {"width": 128, "inner": 256, "layers": 2, "patch": 14, "positions": 577}
TOWER = {"width": 1024, "inner": 4096, "layers": 24, "patch": 14, "positions": 577}
SHARD_BYTES = 5 * 10**9
BYTES_PER_VALUE = 2


def shapes(config: dict[str, int], tower_size: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Original names and shapes of all tensors."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        for name, rows in {"q": hidden, "k": keys, "v": keys, "o": hidden}.items():
            yield f"{path}.self_attn.{name}_proj.weight", (rows, hidden)
        for name, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            yield f"{path}.mlp.{name}_proj.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{path}.{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)
    width = tower_size["width"]
    for layer, inputs in {0: width, 2: hidden}.items():
        yield f"model.mm_projector.{layer}.weight", (hidden, inputs)
        yield f"model.mm_projector.{layer}.bias", (hidden,)
    tower = "model.vision_tower.vision_tower.vision_model"
    yield f"{tower}.embeddings.class_embedding", (width,)
    yield f"{tower}.embeddings.patch_embedding.weight", (width, 3, tower_size["patch"], tower_size["patch"])
    yield f"{tower}.embeddings.position_embedding.weight", (tower_size["positions"], width)
    linears = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (tower_size["inner"], width), "mlp.fc2": (width, tower_size["inner"])}
    norms = [f"encoder.layers.{layer}.layer_norm{i}" for layer in range(tower_size["layers"]) for i in (1, 2)]
    for name in (*norms, "pre_layrnorm", "post_layernorm"):
        yield from ((f"{tower}.{name}.{part}", (width,)) for part in ("weight", "bias"))
    for layer in range(tower_size["layers"]):
        for name, shape in linears.items():
            yield f"{tower}.encoder.layers.{layer}.{name}.weight", shape
            yield f"{tower}.encoder.layers.{layer}.{name}.bias", shape[:1]


def write(folder: Path, config: dict[str, int], tower_size: dict[str, int]) -> int:
    """A checkpoint of random numbers; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in shapes(config, tower_size):
        size = BYTES_PER_VALUE * torch.Size(shape).numel()
        if filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    noise = memoryview(torch.randn(2**24).to(torch.bfloat16).view(torch.uint8).numpy().data)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            total += _write_shard(stream, shard, noise)
        weight_map |= {name: file for name, _ in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    published = {"model_type": "llava_mistral", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"}
    (folder / "config.json").write_text(json.dumps(config | published | {"rope_theta": 1e6, "sliding_window": None}))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, config["vocab_size"])}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return total


def _write_shard(stream: BinaryIO, shard: list[tuple[str, tuple[int, ...]]], noise: memoryview) -> int:
    """A safetensors file without its contents in memory: header, then noise over and over."""
    header, at = {}, 0
    for name, shape in shard:
        end = at + BYTES_PER_VALUE * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for start in range(0, at, len(noise)):
        stream.write(noise[: at - start])
    return at


def measure(source: Path, out: Path) -> tuple[float, float, float]:
    """Memory before and at the peak, in GB, and seconds."""
    before, start = _peak(), time.perf_counter()
    convert(source, out)
    return before, _peak(), time.perf_counter() - start


def _peak() -> float:
    return getrusage(RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is made and deleted")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    try:
        size = write(args.out / "source", *((QUICK, QUICK_TOWER) if args.quick else (FULL, TOWER)))
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            before, peak, seconds = pool.submit(measure, args.out / "source", args.out / "converted").result()
    finally:
        shutil.rmtree(args.out)
    print(
        f"{size / 1e9:.1f} GB of weights: {seconds:.0f} s, {before:.2f} GB of memory before, {peak:.2f} GB at the peak"
    )


if __name__ == "__main__":
    main()
