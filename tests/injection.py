"""Commands of `a3tune` in processes of their own, with a fault at any one change that they make to their files.

Linux only: forks, `RLIMIT_FSIZE`. A fault strikes at the n-th change of the file system (a file opened for writing, a
rename, a removal, an fsync, ...), so that trying every n tries every state that a killed process can leave.
"""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image

from a3tune import convert
from a3tune.cli import main
from a3tune.data.rows import write_rows
from a3tune.labels import store
from a3tune.machine.digests import DIGESTS
from a3tune.machine.files import LOCK
from a3tune.types import Region, Sample
from checkpoints import llava_med_15

Kind = Literal["kill", "stop", "tear", "full", "short", "read-only"]
"""kill: SIGKILL before the change. stop: SIGTERM. tear: SIGXFSZ in the middle of the write. full: "no space left" from
there on. short: the same in the middle of the write (as "file too large"). read-only: nothing can be changed from there
on."""
REFUSALS = ("full", "short", "read-only")
WRITES = ("open", "save")
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
"""Audit events that change files; of `open` those for writing."""
FREEING = ("os.remove", "os.rmdir")
"""Changes that a full disk allows."""
PRELOADED = (
    "a3tune.cli",
    "a3tune.commands.evaluate",
    "a3tune.commands.label",
    "a3tune.commands.train",
    "a3tune.convert.llava",
    "a3tune.data.sets",
    "a3tune.decoding.plain",
    "a3tune.labels.export",
    "a3tune.labels.propose.superpixels",
    "a3tune.labels.rank.clip",
    "a3tune.report.table",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "transformers.integrations.integration_utils",
)
TIMED = ("predictions.jsonl", "results.json", "metrics.jsonl", "trainer_state.json")
"""Files that say when and how fast they were made."""
FLEETING = ("cost", "digest", "heads_overlap")
"""What may differ after an interruption: times and the digests over them, and a comparison with a step whose heads
nobody keeps."""
PATIENCE = 60
"""Seconds in which a command must end after SIGTERM: a step, and its checkpoint."""
TORN_BYTES = 40
"""Of a file that are written before it is torn."""
context = get_context("forkserver")
context.set_forkserver_preload(list(PRELOADED))
polling = Lock()
"""Starting a process polls all others, and an exit code can be read only once."""


@dataclass(frozen=True)
class Fault:
    kind: Kind
    at: int
    """Change that it strikes at; the first is 0."""


@dataclass(frozen=True)
class Signal:
    """Sent so many seconds after a command's first change."""

    after: float
    number: int = signal.SIGKILL
    group: bool = False
    """To all processes of the command at once, as a terminal or a scheduler does; else to the first alone."""


@dataclass(frozen=True)
class Room:
    """A disk that is full but for so many bytes, as in the file system of the world."""

    bytes: int


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; a signal is negative."""
    said: str
    """Standard output and error."""
    changes: list[str]
    """What it did to its files, in order; empty when it was killed."""
    seconds: float
    """From its first change to its end, or to the signal."""
    hung: bool = False
    """Whether it went on after a signal, and had to be killed."""


def run(arguments: Sequence[object], folder: Path, fault: Fault | Signal | None = None) -> Ended:
    """Run `a3tune` with these arguments in `folder`, in a process and a group of its own, on one thread."""
    # Through pipes: a limit on the size of files does not cut them.
    output, changes = context.Pipe(duplex=False), context.Pipe(duplex=False)
    words = [str(argument) for argument in arguments]
    struck = fault if isinstance(fault, Fault) else None
    process = context.Process(target=_child, args=(words, str(folder), struck, output[1], changes[1]))
    with polling:
        process.start()
    output[1].close()
    changes[1].close()
    seconds, hung = _watch(process, folder, fault if isinstance(fault, Signal) else None)
    with open(output[0].fileno(), "rb", closefd=False) as text:
        said = text.read().decode()
    try:
        done = changes[0].recv()
    except EOFError:
        done = []
    with polling:
        process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, said, done, seconds, hung)


def _watch(process: Any, folder: Path, sent: Signal | None) -> tuple[float, bool]:
    """Wait for the end, or send a signal; returns the seconds since the first change, and whether it had to be killed.

    What is left of the command's group is killed in the end: a process that loads data would hold its output open.
    """
    before = _listing(folder)
    while _listing(folder) == before and not wait([process.sentinel], timeout=0.005):
        pass
    start = time.monotonic()
    hung = False
    if not wait([process.sentinel], timeout=sent.after if sent else None):
        assert sent is not None
        (os.killpg if sent.group else os.kill)(process.pid, sent.number)
        hung = not wait([process.sentinel], timeout=PATIENCE)
    seconds = time.monotonic() - start
    if sent is not None and (hung or sent.group):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return seconds, hung


def _listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def _child(arguments: list[str], folder: str, fault: Fault | None, output: Any, changes: Any) -> None:
    os.setpgid(0, 0)
    os.chdir(folder)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    os.environ["COLUMNS"] = "1000"
    torch.set_num_threads(1)
    # Several shards although there is little data.
    store.SHARD_IMAGES = 2
    convert.write_checkpoint = partial(convert.write_checkpoint, shard_bytes=2**17)
    watch = Watch(Path(folder), fault)
    watch.start()
    sys.argv = ["a3tune", *arguments]
    try:
        main()
    finally:
        watch.fault = None
        changes.send(watch.changes)


class Watch:
    """Notes what this process changes below a folder, and lets the fault strike. There is no way to end it."""

    def __init__(self, folder: Path, fault: Fault | None) -> None:
        self.folder = str(folder)
        self.fault = fault
        self.changes: list[str] = []

    def start(self) -> None:
        os.fsync = self._noted(os.fsync, "os.fsync", _name)
        for module in (safetensors.torch, safetensors.numpy):
            if hasattr(module, "serialize_file"):
                noted = self._noted(module.serialize_file, "save", lambda _, path, *__: str(path))
                setattr(module, "serialize_file", noted)  # noqa: B010
        torch.save = self._noted(torch.save, "save", lambda _, path, *__: str(path))
        sys.addaudithook(self._hook)

    def _noted(self, function: Callable, event: str, path: Callable[..., str]) -> Callable:
        """Neither audit events nor Python's own: written by compiled code."""

        def noted(*args: Any, **keywords: Any) -> Any:
            self.change(event, path(*args))
            return function(*args, **keywords)

        return noted

    def _hook(self, event: str, args: tuple) -> None:
        if event not in CHANGES or not isinstance(args[0], str | bytes | os.PathLike):
            return
        if event == "os.mkdir" and os.path.exists(args[0]):  # noqa: PTH110  nothing will change
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        # `rmtree` names what it removes relative to a folder that it has open.
        relative = event in FREEING and args[-1] != -1
        self.change(event, str(self.folder) if relative else os.fsdecode(args[0]))

    def change(self, event: str, name: str) -> None:
        path = os.path.abspath(name)  # noqa: PTH100  `Path.resolve` would open files
        if not path.startswith(self.folder):
            return
        at = len(self.changes)
        self.changes.append(f"{event} {os.path.relpath(path, self.folder)}")
        if self.fault is not None and at >= self.fault.at:
            strike(self.fault, event, path, first=at == self.fault.at)


def _name(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def strike(fault: Fault, event: str, path: str, *, first: bool) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        if first:
            os.kill(os.getpid(), signal.SIGTERM)
    elif fault.kind == "read-only":
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
    elif fault.kind == "full":
        if event not in FREEING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    elif first:
        if fault.kind == "tear":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        size = os.path.getsize(path) if os.path.isfile(path) else 0  # noqa: PTH113, PTH202
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + TORN_BYTES, resource.RLIM_INFINITY))


def writes(changes: Sequence[str]) -> list[int]:
    """Changes that are the beginning of a write."""
    return [at for at, change in enumerate(changes) if change.split(" ", 1)[0] in WRITES]


def content(folder: Path) -> dict[str, str]:
    """Name -> hash of all files below, without what says when and how fast they were made."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(_lasting(path)).hexdigest()
    return found


def _lasting(path: Path) -> bytes:
    text = path.read_bytes()
    if path.name == LOCK:
        return b""
    if path.name not in TIMED and path.name != DIGESTS:
        return text
    try:
        if path.name == DIGESTS:  # of files that say when they were made
            return json.dumps([pair for pair in json.loads(text).items() if pair[0] not in TIMED]).encode()
        found = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        return json.dumps(_strip(found)).encode()
    except ValueError:  # damaged
        return text


def _strip(value: Any) -> Any:
    if isinstance(value, list):
        return [_strip(item) for item in value]
    if isinstance(value, dict):
        return {name: _strip(item) for name, item in value.items() if name not in FLEETING}
    return value


def make_inputs(folder: Path) -> None:
    """What the commands start from: questions about small images, settings, a data set, a checkpoint to convert."""
    (folder / "data").mkdir(parents=True)
    samples = []
    for number in range(4):
        image = folder / "data" / f"{number}.png"
        Image.radial_gradient("L").rotate(20 * number, fillcolor=99).resize((32 + number, 32)).save(image)
        region = Region(box=(4.0, 4.0, 20.0, 24.0))
        meta = {"modality": "MRI", "organ": "liver"}
        samples.append(Sample(f"question {number}", image, "Is it bright?", "yes", "closed", (region,), meta))
    write_rows(folder / "data" / "rows.jsonl", samples)
    (folder / "settings.yaml").write_text(
        "data: {train: ../inputs/data/rows.jsonl}\nlabels: {source: truth}\nadapter: {rank: 2, expert_rank: 2}\n"
        "alignment: {heads: 0.5}\nmodel: {device: cpu}\nevaluation: {max_new_tokens: 4, batch_size: 2}\n"
        "training: {max_steps: 2, batch_size: 2, accumulation: 1, save_steps: 1, log_steps: 1}\n"
    )
    rad = folder / "rad" / "images"
    rad.mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(rad / "synpic1.jpg")
    row = {"image_name": "synpic1.jpg", "image_organ": "HEAD", "question": "Where?", "answer": "left"}
    row |= {"answer_type": "OPEN", "question_type": "POS", "phrase_type": "freeform"}
    for number, split in enumerate(("train", "test")):
        (folder / "rad" / f"{split}set.json").write_text(json.dumps([row | {"qid": number}]))
    llava_med_15(folder / "checkpoint")


SETTINGS = ("--config", "../inputs/settings.yaml")
MAIN: dict[str, list[str]] = {
    "label": ["label", "../inputs/data/rows.jsonl", "--out", "labels", *SETTINGS],
    "train": ["train", *SETTINGS, "output=run"],
    "eval": [
        *("eval", "../inputs/data/rows.jsonl", "--adapter", "none", "--out", "run", *SETTINGS),
        *("--occlude", "evaluation.fillings=mean"),
    ],
    "convert": ["convert", "../inputs/checkpoint", "--out", "model"],
}
"""Name -> arguments, in a folder beside `inputs`: the commands that work long and go on where they were."""
PARALLEL = {"train, 2 workers": [*MAIN["train"], "training.workers=2"]}
"""The same with processes of their own, for signals to all of them."""
OTHERS: dict[str, list[str]] = {
    "ask": ["ask", "Where?", "--image", "../inputs/data/0.png", "--out", "heat.png", *SETTINGS],
    "label export": [
        *("label", "export", "../inputs/labels", "../inputs/data/rows.jsonl", "--format", "overlays"),
        *("--out", "overlays", *SETTINGS),
    ],
    "data prepare": ["data", "prepare", "../inputs/rad", "--out", "rad"],
    "report": ["report", "../inputs/base", "../inputs/sampled", "--out", "report.html"],
    "compare": ["compare", "../inputs/base", "../inputs/sampled", "--out", "table.csv"],
}
"""The same of those that begin anew, with `--force` where a part of their output is there."""


Faults = Sequence[Fault | Room | Signal]


class World:
    """Inputs, and how each command ends undisturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self._references: dict[str, tuple[dict[str, str], list[str]]] = {}
        make_inputs(folder / "inputs")

    def reference(self, name: str) -> tuple[dict[str, str], list[str]]:
        """What a command leaves, as `content`, and the changes that it makes."""
        if name not in self._references:
            if name == "label export":
                self._keep("label", "labels", "labels")
            if name in ("report", "compare"):
                self._keep("eval", "run", "base")
                self._keep("eval", "run", "sampled", "evaluation.strategy=sampling")
            self._clear()
            ended = self._run(name)
            assert ended.code == 0, ended.said
            self._references[name] = content(self.work), ended.changes
        return self._references[name]

    def after(self, name: str, faults: "Faults", between: Callable[[Path], None] = lambda work: None) -> "Trial":
        """Run a command with each of the faults in turn, then undisturbed.

        `between` may change what lies in the folder that the command works in, or in `inputs` beside it.
        """
        expected, _ = self.reference(name)
        self._clear()
        broken = [self._run(name, fault) for fault in faults]
        between(self.work)
        last = self._run(name)
        # Who was interrupted was told that the same command goes on.
        told = all(isinstance(fault, Fault) and fault.kind == "stop" for fault in faults)
        if not told and last.code == 2 and "is there already" in last.said and content(self.work) != expected:
            last = self._run(name, force=True)
        return Trial(name, faults, broken, last, _differences(expected, content(self.work)))

    def _run(self, name: str, fault: Fault | Room | Signal | None = None, *, force: bool = False) -> Ended:
        arguments = [*(MAIN | PARALLEL | OTHERS)[name], *(["--force"] if force else [])]
        if isinstance(fault, Room):
            with _filled(self.folder, fault.bytes):
                return run(arguments, self.work)
        return run(arguments, self.work, fault)

    def _keep(self, name: str, made: str, kept: str, *more: str) -> None:
        """Make the output of a command an input of others."""
        if not (self.folder / "inputs" / kept).exists():
            self._clear()
            ended = run([*MAIN[name], *more], self.work)
            assert ended.code == 0, ended.said
            (self.work / made).rename(self.folder / "inputs" / kept)

    def _clear(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()


@dataclass(frozen=True)
class Trial:
    """A command with faults, and then without."""

    command: str
    faults: "Faults"
    broken: Sequence[Ended]
    """How it ended with each of them."""
    last: Ended
    differences: list[str]
    """Files that are not as the undisturbed command leaves them."""

    @property
    def struck(self) -> bool:
        """Whether all faults came before the command was done."""
        return all(ended.code != 0 for ended in self.broken)

    @property
    def wrong(self) -> str:
        """What should be otherwise; empty if nothing."""
        for fault, ended in zip(self.faults, self.broken, strict=True):
            if ended.hung:
                return f"{fault}: not ended after {PATIENCE} s"
            asked = isinstance(fault, Fault) and fault.kind == "stop"
            if asked and (ended.code not in (0, 143) or "Traceback" in ended.said):
                return f"{fault}: ended with {ended.code}: {ended.said[-1500:]}"
            refused = isinstance(fault, Room) or (isinstance(fault, Fault) and fault.kind in REFUSALS)
            if refused and ended.code not in (0, 2):
                return f"{fault}: ended with {ended.code}: {ended.said[-1500:]}"
            if ended.code == 2 and not re.search("^a3tune: .*(cannot be|is there already)", ended.said, re.MULTILINE):
                return f"{fault}: said {ended.said[-1500:]}"
        done = self.last.code == 0 or "is there already" in self.last.said
        if not done:
            return f"run again: ended with {self.last.code}: {self.last.said[-1500:]}"
        return f"differs: {', '.join(self.differences)}" if self.differences else ""


@contextmanager
def _filled(folder: Path, room: int) -> Iterator[None]:
    """Fill the file system of `folder` up to `room` bytes."""
    ballast = folder / "ballast"
    disk = os.statvfs(folder)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - room))
    try:
        yield
    finally:
        ballast.unlink()


def _differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
