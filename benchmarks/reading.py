"""What reading an image takes of a training step: decoding it, and making the model's input of it.

    python benchmarks/reading.py [--quick] [--repetitions N] [--out FILE]

A PNG of 1024 x 1024 in grey and in colours, and an uncompressed DICOM of 512 x 512; the processor of a LLaVA at 336
pixels. Processor time of one thread, beside the computed time of a sample's step of a 7B model on a GPU at half the
speed of the roofline. What the collator still holds of an earlier epoch costs nothing of this.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from decoding_cost import TEXTS
from measure import about, listed, table, take_turns, write
from PIL import Image
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from roofline import DEVICES, LAYERS, REACHED, parts

from a3tune.data.images import load_image
from a3tune.vlm.encode import prepare
from a3tune.vlm.load import Vlm
from a3tune.vlm.tiny import random_vlm, tiny_processor, train_tokenizer

PIXELS = 336
OURS = 4
"""Of the roofline's parts, those of our step."""


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images, once")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = random_vlm(hidden=32, layers=1, heads=4, kv_heads=2, image_size=PIXELS)
    vlm = Vlm(model, tiny_processor(train_tokenizer(TEXTS), image_size=PIXELS), "random")
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
