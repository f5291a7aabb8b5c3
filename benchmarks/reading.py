"""What reading an image takes of a training step: decoding it, and making the model's input of it. With `--ahead`, how
much of it an evaluation hides behind its answers.

    python benchmarks/reading.py [--ahead] [--quick] [--repetitions N] [--out FILE]

A PNG of 1024 x 1024 in grey and in colours, and an uncompressed DICOM of 512 x 512; the processor of a LLaVA at 336
pixels. Processor time of one thread, beside the computed time of a sample's step of a 7B model on a GPU at half the
speed of the roofline. What the collator still holds of an earlier epoch costs nothing of this.

With `--ahead`: whole evaluations of a tiny model, the next batch read by a thread while one is asked, in turns with the
way before, between two batches. Once as it is, where reading and model share the processor, and once with a wait in
every pass of the model, as a GPU makes the processor wait: the thread reads then.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from decoding_cost import TEXTS
from measure import Spread, about, listed, table, take_turns, write
from PIL import Image
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from roofline import DEVICES, LAYERS, REACHED, parts

from a3tune.attention.capture import use_capture
from a3tune.config import EvaluationConfig
from a3tune.data.images import load_image
from a3tune.evaluation import evaluate as evaluation
from a3tune.evaluation.ahead import read_ahead
from a3tune.types import Sample
from a3tune.vlm.encode import prepare
from a3tune.vlm.load import Vlm
from a3tune.vlm.tiny import random_vlm, tiny_processor, train_tokenizer

PIXELS = 336
OURS = 4
"""Of the roofline's parts, those of our step."""
QUESTIONS, BATCH, TOKENS = 16, 4, 4
WAIT = 0.15
"""Seconds of a pass: a batch waits 5 times, for its prompt with its first token, 3 later ones, and the look at all."""


def scan(side: int, channels: int) -> np.ndarray:
    """Smooth, with some noise, as scans are; uint8."""
    noise = np.random.default_rng(0)
    coarse = noise.integers(0, 256, (side // 8, side // 8, channels), np.uint8).squeeze()
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.int16)
    return np.clip(smooth + noise.integers(-3, 4, smooth.shape), 0, 255).astype(np.uint8)


def images(folder: Path, quick: bool) -> dict[str, Path]:
    """What it is -> a file."""
    large, small = (64, 32) if quick else (1024, 512)
    found = {f"PNG {large} x {large}, {kind}": folder / f"{kind}.png" for kind in ("grey", "colour")}
    for file, channels in zip(found.values(), (1, 3), strict=True):
        Image.fromarray(scan(large, channels)).save(file)
    dicom = found[f"DICOM {small} x {small}"] = folder / "ct.dcm"
    meta, scanned = FileMetaDataset(), Dataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = scanned.SOPInstanceUID = generate_uid()
    scanned.file_meta, scanned.SOPClassUID, scanned.Modality = meta, CTImageStorage, "CT"
    scanned.Rows = scanned.Columns = small
    scanned.BitsAllocated = scanned.BitsStored = 16
    scanned.HighBit, scanned.PixelRepresentation, scanned.SamplesPerPixel = 15, 1, 1
    scanned.PhotometricInterpretation, scanned.RescaleSlope, scanned.RescaleIntercept = "MONOCHROME2", 1, -1024
    scanned.WindowCenter, scanned.WindowWidth = 40, 400
    scanned.PixelData = (scan(small, 1).astype(np.int16) * 8).tobytes()
    scanned.save_as(dicom, enforce_file_format=True)
    return found


@contextmanager
def between(read: Callable[[Sample], Any], batches: Sequence[Sequence[Sample]]) -> Iterator[Iterator[Sequence["_Now"]]]:
    """In the place of `read_ahead`: every sample is read when it is asked."""
    yield ([_Now(sample, read) for sample in batch] for batch in batches)


class _Now:
    def __init__(self, sample: Sample, read: Callable[[Sample], Any]) -> None:
        self.sample, self.id, self._read = sample, sample.id, read

    def read(self) -> Any:
        return self._read(self.sample)


def ahead(vlm: Vlm, quick: bool, repetitions: int) -> tuple[dict[str, Any], list[list[str]]]:
    """Seconds of evaluations by image and side, and the rows of their table."""
    use_capture(vlm.model)
    settings = EvaluationConfig(batch_size=BATCH, max_new_tokens=TOKENS, rows="answer", heads=1)
    count = BATCH if quick else QUESTIONS
    record, rows = {}, []
    with TemporaryDirectory() as folder:
        small = Path(folder) / "small.png"
        Image.fromarray(scan(64, 1)).save(small)
        _, colour, _ = images(Path(folder), quick).items()
        for kind, file in (("PNG 64 x 64, grey", small), colour):
            samples = [Sample(f"{n}", file, f"Is there a lesion {n}?", "yes", "closed") for n in range(count)]
            for what, wait in (("as it is", 0.0), ("waits", WAIT)):
                waited: dict[str, list[float]] = {"between": [], "ahead": []}
                sides = {
                    name: partial(_evaluate, vlm, samples, settings, wait, reading, waited[name])
                    for name, reading in (("between", between), ("ahead", read_ahead))
                }
                cost = take_turns(sides, 1 if quick else repetitions)
                for_reading = {name: Spread.of(seconds[1:]) for name, seconds in waited.items()}  # not of the warm-up
                record[f"{kind}, {what}"] = {name: cost[name] | {"for reading": for_reading[name]} for name in sides}
                hidden = 1 - for_reading["ahead"].median / for_reading["between"].median
                rows.append(
                    [
                        kind,
                        what,
                        *map(str, for_reading.values()),
                        f"{100 * hidden:.0f} %",
                        *(str(cost[name][clock]) for clock in ("cpu", "wall") for name in sides),
                    ]
                )
    return record, rows


def _evaluate(
    vlm: Vlm, samples: Sequence[Sample], settings: EvaluationConfig, wait: float, reading: Any, waited: list[float]
) -> None:
    """One evaluation that reads by `reading`; `waited` gets the seconds that its batches waited to be read."""
    waited.append(0.0)

    def timed(one: Any) -> Any:
        start = time.perf_counter()
        read = one.read()
        waited[-1] += time.perf_counter() - start
        return SimpleNamespace(sample=one.sample, id=one.id, read=lambda: read)

    @contextmanager
    def watched(read: Callable[[Sample], Any], batches: Sequence[Sequence[Sample]]) -> Iterator[Iterator[Any]]:
        with reading(read, batches) as found:
            yield ([timed(one) for one in batch] for batch in found)

    hook = vlm.model.register_forward_pre_hook(lambda *_: time.sleep(wait))
    evaluation.read_ahead = watched
    try:
        evaluation.evaluate(vlm, samples, settings)
    finally:
        hook.remove()
        evaluation.read_ahead = read_ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ahead", action="store_true", help="evaluations that read ahead")
    parser.add_argument("--quick", action="store_true", help="small images, once")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = random_vlm(hidden=32, layers=1, heads=4, kv_heads=2, image_size=PIXELS)
    vlm = Vlm(model, tiny_processor(train_tokenizer(TEXTS), image_size=PIXELS), "random")
    if options.ahead:
        record, rows = ahead(vlm, options.quick, options.repetitions)
        header = ["Image", "Model", "Waited for reading, between: s", "ahead: s", "Hidden"]
        text = table([*header, "CPU, between: s", "ahead: s", "Wall, between: s", "ahead: s"], rows)
        text = "\n".join(["# Reading ahead", "", *listed(about()), "", text])
        write(options.out, {"about": about(), "seconds": record}, text)
        return
    own = list(parts(8).values())[:OURS]
    steps = {name: 1e3 * LAYERS * sum(part.seconds(card) for part in own) / REACHED for name, card in DEVICES.items()}
    record, rows = {}, []
    with TemporaryDirectory() as folder:
        for kind, file in images(Path(folder), options.quick).items():
            image = load_image(file)
            sides: dict[str, Any] = {
                "decode": lambda file=file: load_image(file),
                "prepare": lambda image=image: prepare(vlm, [image], "Is there a lesion?", "yes"),
            }
            found = record[kind] = take_turns(sides, 1 if options.quick else options.repetitions)
            both = 1e3 * sum(side["cpu"].median for side in found.values())
            times = [f"{1e3 * side['cpu'].median:.1f}" for side in found.values()]
            rows.append(
                [kind, *times, *(f"{both:.0f} of {step:.0f} ({100 * both / step:.0f} %)" for step in steps.values())]
            )
    lines = listed(about())
    header = ["Image", "Decode, ms", "Prepare, ms", *(f"{name}: ms of a sample's step, computed" for name in steps)]
    text = "\n".join(["# Reading images", "", *lines, "", table(header, rows)])
    write(options.out, {"about": about(), "seconds": record, "steps": steps}, text)


if __name__ == "__main__":
    main()
