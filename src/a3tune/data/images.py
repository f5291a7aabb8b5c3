"""Any 2D image, frame or slice -> RGB, and the hash that names its content. Knows nothing of questions or models.

Of a file that holds several images, a fragment after the path says which: `scan.dcm#frame=3`, `ct.nii.gz#axial=12`
(`medical.py`).
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from a3tune.data.dicom import decode_dicom
from a3tune.data.dicom_file import is_dicom
from a3tune.data.pictures import decode_picture
from a3tune.data.volume import decode_nifti, is_nifti, one_file
from a3tune.errors import DataError
from a3tune.machine.hashes import file_hash
from a3tune.types import ImageSource

_EMPTY = hashlib.sha256().hexdigest()


def load_image(source: ImageSource) -> Image.Image:
    """Decode a 2D image to 8-bit RGB, upright.

    Images of more than 8 bits, integer or float, are windowed to their own 0.5-99.5 percentile range (`window`);
    every other image keeps its values. Transparency is laid on black, EXIF orientation is applied, of several frames
    the first is taken unless the path's fragment names one. DICOM and NIfTI: see `medical.py`.

    Raises:
        DataError: the file is missing, empty, truncated, no image, or has more than `window.MAX_PIXELS` pixels; its
            fragment names nothing in it.
    """
    name, (data, fragment) = describe(source), read_image(source)
    for recognises, decode in DECODERS:
        if recognises(data):
            try:
                return decode(data, fragment)
            except DataError as error:
                raise DataError(f"{name}: {error}") from None
            except Exception as error:  # a decoder of damaged bytes may raise anything
                raise DataError(f"{name}: expected a complete image file, could not decode it: {error}") from error
    raise AssertionError("the last decoder recognises everything")


def content_hash(source: ImageSource) -> str:
    """SHA-256 of the encoded bytes, as 64 hex digits: the same file under two names is one image.

    A fragment counts: two slices of one volume are two images.

    Raises:
        DataError: the file cannot be read or is empty.
    """
    if isinstance(source, Path) and "#" not in source.name and not _parts(source)[0].is_file():
        with _readable(source):
            digest = file_hash(source)
        if digest == _EMPTY:
            raise _is_empty(source)
        return digest
    data, fragment = read_image(source)
    content = hashlib.sha256(data)
    if fragment:
        content.update(f"#{fragment}".encode())
    return content.hexdigest()


def _parts(file: Path) -> tuple[Path, Path]:
    """Where the header and the values of a NIfTI volume in two files are, of which `file` is one."""
    stem, packed = file.name.removesuffix(".gz")[:-4], ".gz" * file.name.endswith(".gz")
    return file.with_name(f"{stem}.hdr{packed}"), file.with_name(f"{stem}.img{packed}")


def describe(source: ImageSource) -> str:
    """What an error message calls an image: its path, or the number of bytes it came in."""
    return f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def split_fragment(path: Path) -> tuple[Path, str]:
    """The file and the fragment of `scan.dcm#frame=3`; a file whose own name holds a `#` has no fragment."""
    name, mark, fragment = path.name.rpartition("#")
    if not mark or not name or path.exists():
        return path, ""
    return path.with_name(name), fragment


def read_image(source: ImageSource) -> tuple[bytes, str]:
    """The encoded bytes of an image, and its path's fragment ("" if there is none).

    Raises:
        DataError: the file cannot be read or is empty.
    """
    if isinstance(source, bytes):
        data, fragment = source, ""
    else:
        with _readable(source):
            file, fragment = split_fragment(source)
            data = file.read_bytes()
            header, values = _parts(file)
            if header.is_file() and file in (header, values):
                data = one_file(header.read_bytes(), values.read_bytes())
    if not data:
        raise _is_empty(source)
    return data, fragment


@contextmanager
def _readable(source: ImageSource) -> Iterator[None]:
    try:
        if isinstance(source, Path) and _never_ends(split_fragment(source)[0]):
            raise ValueError("it is a pipe or a device")
        yield
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{source}: expected an image file, cannot read it: {reason}") from error


def _never_ends(path: Path) -> bool:
    """Whether reading may wait for ever, or fill the memory; rows may name any path."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _is_empty(source: ImageSource) -> DataError:
    return DataError(f"{describe(source)}: expected an image, the file is empty")


DECODERS: list[tuple[Callable[[bytes], bool], Callable[[bytes, str], Image.Image]]] = [
    (is_dicom, decode_dicom),
    (is_nifti, decode_nifti),
    (lambda data: True, decode_picture),
]
"""(does it know these bytes, bytes and fragment -> RGB); the first that knows them decodes. Pillow takes the rest."""
