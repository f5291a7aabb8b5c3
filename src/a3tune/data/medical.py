"""What DICOM files and volumes have in common: fragments, and decoders of which nothing that they say gets out.

A fragment after the path says what is shown:

    scan.dcm                     the first frame
    scan.dcm#frame=3             a frame, counted from 0
    ct.nii.gz#axial=12           a slice (axial, coronal or sagittal), counted from 0 from the feet, back or left
    ct.nii.gz#axial=12&volume=5  of a series of volumes, counted from 0; the first if left out
    ct.nii.gz#axial=12&window=lung, scan.dcm#window=bone    a customary window of CT, for values in Hounsfield units
"""

from collections.abc import Callable
from typing import TypeVar

from a3tune.errors import DataError, shown
from a3tune.machine.quiet import ignoring

Result = TypeVar("Result")


def read_fragment(fragment: str, known: tuple[str, ...]) -> dict[str, str]:
    """What a fragment asks for, by name. Raises DataError for a name that is none of `known`, or stands there twice."""
    asked: dict[str, str] = {}
    for part in filter(None, fragment.split("&")):
        key, _, value = part.partition("=")
        if key not in known or key in asked:
            raise DataError(
                f"'#{fragment:.60}': expected each at most once of {', '.join(known)}, got {shown(part, 40)}"
            )
        asked[key] = value
    return asked


def counted(asked: dict[str, str], key: str) -> int:
    """A number of a fragment, 0 where it says none. Raises DataError for another text."""
    value = asked.get(key, "0")
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise DataError(f"{key}: expected a number counted from 0, got {shown(value, 40)}")
    return int(value)


def quietly(what: str, decode: Callable[[], Result]) -> Result:
    """Run a decoder whose errors and warnings may quote the header, and let none of their words out."""
    try:
        with ignoring():
            return decode()
    except DataError:
        raise
    except Exception as error:  # a decoder of damaged bytes may raise anything
        raise DataError(f"expected a complete {what}, could not decode it ({type(error).__name__})") from None


def missing(kind: str, package: str) -> DataError:
    """Of a package that an extra brings."""
    return DataError(f"{kind} needs {package}, which is not installed: pip install 'a3tune[medical]'")
