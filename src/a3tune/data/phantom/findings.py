"""The report of a phantom scan: one sentence about the image, one about each organ that may carry lesions.

Every word is true of the scan and follows one template, so that a model can learn the form at once, and what is left is
to look.
"""

from a3tune.data.phantom.questions import NUMBERS, with_article
from a3tune.data.phantom.scan import Lesion, Scan

REPORT_PROMPT = "Write a report of this image."


def findings(scan: Scan) -> str:
    """Such as "Axial CT of the abdomen. There is a large cyst in the liver. The spleen is normal."."""
    sentences = [f"{scan.plane.capitalize()} {scan.modality} of the {scan.body}."]
    for organ in scan.hosts:
        lesions = [lesion for lesion in scan.lesions if lesion.organ == organ]
        sentences.append(_sentence(organ, lesions))
    return " ".join(sentences)


def _sentence(organ: str, lesions: list[Lesion]) -> str:
    if not lesions:
        return f"The {organ} is normal."
    if len(lesions) == 1:
        return f"There is {with_article(f'{lesions[0].size} {lesions[0].kind}')} in the {organ}."
    return f"There are {NUMBERS[len(lesions) - 1]} lesions in the {organ}."
