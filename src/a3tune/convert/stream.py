"""Checkpoints tensor by tensor: what a folder holds, without reading it, and writing it out again in shards.

Knows the files of safetensors and of `torch.save`; knows no model.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from a3tune.errors import ModelError, OutputError
from a3tune.models import check_finite, read_pickled

if TYPE_CHECKING:
    import torch

HEAD = "lm_head.weight"
"""Tensor of the language model's head, by all its names."""
SHARD_BYTES = 2 * 10**9
"""Largest shard; a shard is held in memory while it is written."""
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
"""Names of safetensors -> of torch for the types that the tensors of a language model have."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read each time it is used, and not kept."""

    name: str
    shape: tuple[int, ...]
    dtype: "torch.dtype"
    read: "Callable[[], torch.Tensor]"

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def renamed(self, name: str) -> "LazyTensor":
        return replace(self, name=name)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with `config.json` and weights."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder. Raises `ModelError` when there is none or it is not a JSON object."""
    config = read_json(folder / "config.json")
    if not config:
        raise ModelError(f"{folder}: expected a model's folder with a config.json, found none. Check the path.")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file. Raises `ModelError` when it is something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: expected JSON, got something else ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(content).__name__}. Download it again.")
    return content


def open_checkpoint(folder: Path) -> Checkpoint:
    """Names, shapes and types of everything in a folder's shards; no weights are read.

    safetensors are preferred to `pytorch_model.bin`, of which only tensors are read (no code is run). Raises
    `ModelError` naming the shard that is missing or cannot be read.
    """
    config = read_config(folder)
    tensors = {tensor.name: tensor for path in weight_files(folder) for tensor in _contents(path)}
    return Checkpoint(folder, config, tensors)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights. Raises `ModelError` when there are none, or one is missing."""
    paths = _named_files(folder)
    for path in paths:
        if not os.path.isfile(path):  # noqa: PTH113  (False for a name that no file can have)
            raise ModelError(f"{folder}: the shard {path.name[:80]} is missing; its index names it. Download it again.")
    return paths


def write_checkpoint(
    tensors: Sequence[LazyTensor], folder: Path, progress: Callable[[int, int], None], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write safetensors of at most `shard_bytes` each (but for a single larger tensor), and their index.

    Memory: one shard and one tensor. `progress` is called with the number of tensors written, and of all. Raises
    `OutputError` when the disk does not take it.
    """
    from safetensors.torch import save_file

    shards = list(_split(tensors, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        one_file = len(shards) == 1
        name = "model.safetensors" if one_file else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with writing(folder / name):
            save_file({tensor.name: _checked(tensor) for tensor in shard}, folder / name, metadata={"format": "pt"})
        weight_map |= {tensor.name: name for tensor in shard}
        progress(len(weight_map), len(tensors))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": weight_map}
        with writing(folder / "model.safetensors.index.json"):
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what is raised on a full or forbidden disk into an `OutputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written: {error}. Make room or choose another folder.") from error


def _named_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = read_json(folder / f"{name}.index.json")
        if index:
            shards = index.get("weight_map")
            names: list[Any] = list(shards.values()) if isinstance(shards, dict) else [None]
            if not all(isinstance(shard, str) and Path(shard).name == shard for shard in names):
                raise ModelError(f"{folder}: {name}.index.json names no files of this folder. Download it again.")
            return [folder / shard for shard in sorted(set(names))]
        if (folder / name).is_file():
            return [folder / name]
    raise ModelError(
        f"{folder}: expected model.safetensors or pytorch_model.bin, or an index of their shards; found neither. "
        "Download the weights too."
    )


def _contents(path: Path) -> list[LazyTensor]:
    import torch

    with _readable(path):
        if path.suffix == ".safetensors":
            dtypes = {name: getattr(torch, dtype) for name, dtype in DTYPES.items()}
            with safe_open(path, framework="pt") as shard:
                slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
                return [
                    LazyTensor(name, tuple(piece.get_shape()), dtypes[piece.get_dtype()], partial(_read, path, name))
                    for name, piece in slices.items()
                ]
        return [
            LazyTensor(name, tuple(tensor.shape), tensor.dtype, partial(_read, path, name))
            for name, tensor in read_pickled(path, mmap=True).items()
        ]


def _read(path: Path, name: str) -> "torch.Tensor":
    # The shard is opened anew for every tensor: what a lasting memory map has touched would all count as ours.
    with _readable(path):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as shard:
                return shard.get_tensor(name)
        return read_pickled(path, mmap=True)[name]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # readers of damaged weights may raise anything
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"{path}: expected whole weights, reading failed: {first}. Download this file again."
        ) from error


def _split(tensors: Iterable[LazyTensor], most: int) -> Iterator[list[LazyTensor]]:
    shard: list[LazyTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > most:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _checked(tensor: LazyTensor) -> "torch.Tensor":
    """The values, as announced: a plan that does not hold is our own mistake."""
    values = tensor.read().contiguous()
    if (tuple(values.shape), values.dtype) != (tensor.shape, tensor.dtype):
        raise RuntimeError(f"{tensor.name}: planned {tensor.shape} {tensor.dtype}, got {values.shape} {values.dtype}")
    try:
        check_finite({tensor.name: values})
    except ValueError as error:
        raise ModelError(f"{error}. Download the checkpoint again.") from error
    return values
