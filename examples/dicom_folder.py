"""From a folder of DICOM files to rows and answers; two CT windows of one slice are two images.

Writes two synthetic DICOM files first, so that it runs without data. Needs `pip install 'a3tune[medical]'`.

    python examples/dicom_folder.py --quick --out out
"""

import argparse
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from a3tune.commands.ask import ask
from a3tune.config import load_config
from a3tune.data.phantom import make_scan
from a3tune.data.rows import read_rows, write_rows
from a3tune.types import Sample

WINDOWS = ("abdomen", "lung")


def write_dicom(path: Path, hounsfield: np.ndarray, patient: str) -> None:
    """A CT slice as a scanner writes it: 12 bits above -1024, and a header that knows the patient."""
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.SOPClassUID, file.SOPInstanceUID = CTImageStorage, generate_uid()
    file.PatientName, file.PatientID, file.Modality = patient, patient, "CT"
    file.Rows, file.Columns = hounsfield.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    file.RescaleSlope, file.RescaleIntercept = 1, -1024
    file.PixelData = (hounsfield + 1024).astype(np.uint16).tobytes()
    file.save_as(path, enforce_file_format=True)


def main(out: Path, quick: bool) -> None:
    folder = out / "dicom"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        grey = make_scan(number).image.astype(float)
        write_dicom(folder / f"{number}.dcm", np.round(-150 + grey / 255 * 400), f"Doe^Jane {number}")

    samples = []
    for number, path in enumerate(sorted(folder.glob("*.dcm"))):
        # Reading tags is up to you: a3tune reads none. The patient's number in here is one of ours, not the header's.
        modality = str(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Modality"]).Modality)
        samples += [
            Sample(
                id=f"{number}-{window}",
                image=folder / f"{path.name}#window={window}",
                prompt="Which imaging modality is this?",
                answer=modality,
                answer_type="open",
                meta={"modality": modality, "window": window, "patient": str(number)},
            )
            for window in WINDOWS
        ]
    write_rows(out / "rows.jsonl", samples)

    config = load_config(None, ["evaluation.max_new_tokens=8"])
    for sample in read_rows(out / "rows.jsonl")[: 1 if quick else None]:
        picture = out / f"{sample.id}.png"
        print(f"{sample.id:12} {ask(config, None, Path(sample.image), sample.prompt, picture)!r}   {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for everything it writes")
    parser.add_argument("--quick", action="store_true", help="one question")
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
