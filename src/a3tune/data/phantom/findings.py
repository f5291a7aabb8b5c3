"""The report of a phantom scan: one sentence about the image, one about each organ that may carry lesions.

Every sentence is true of the scan and follows one template, in words that the shipped base has read in captions: what
is left to learn is the form, and to look.
"""

from a3tune.data.phantom.questions import NUMBERS
from a3tune.data.phantom.scan import Lesion, Scan

REPORT_PROMPT = "Write a report of this image."


def findings(scan: Scan) -> str:
    """Such as "axial CT of the abdomen. liver: one large cyst. spleen: no lesion."."""
    sentences = [f"{scan.plane} {scan.modality} of the {scan.body}."]
    for organ in scan.hosts:
        lesions = [lesion for lesion in scan.lesions if lesion.organ == organ]
        sentences.append(f"{organ}: {_seen(lesions)}.")
    return " ".join(sentences)


def _seen(lesions: list[Lesion]) -> str:
    if not lesions:
        return "no lesion"
    if len(lesions) == 1:
        return f"one {lesions[0].size} {lesions[0].kind}"
    return f"{NUMBERS[len(lesions) - 1]} lesions"
