"""What a table gives as an image -> a file: found beside the table, or written there where the table holds it."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a3tune.data.embedded import embedded_file
from a3tune.data.images import content_hash, load_image, split_fragment
from a3tune.data.importing.sources import PICTURES
from a3tune.data.paths import is_address
from a3tune.errors import DataError, is_data_uri, shown
from a3tune.machine.files import write_atomic

_SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"GI": ".gif", b"BM": ".bmp", b"II": ".tif", b"MM": ".tif"}
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
_LONGEST_NAME = 1000


@dataclass(slots=True)
class Pictures:
    """Turns cells into paths of images."""

    folders: tuple[Path, ...]
    """Where names of images are looked for, in this order."""
    out: Path
    """Where images go that a table holds; by their content, each once."""
    new: Callable[[Path], Path]
    """Told what is about to be made; see `machine.files.all_or_none`."""
    _found: dict[tuple[Path, str], Path] = field(default_factory=dict)
    _listed: dict[Path, dict[str, list[Path]]] = field(default_factory=dict)
    """Folder -> name in small letters -> files."""

    def find(self, beside: Path, value: Any) -> Path:
        """The file of a cell: a name (beside the table, in `folders`), a data URI, base 64, bytes, or a struct of them.

        Raises:
            DataError: it is no image of one of these kinds, an address, or no file of this name is there.
        """
        if isinstance(value, list | tuple):
            if len(value) != 1:
                raise DataError(f"expected one image, got {len(value)}; a row has one: name the image that answers it")
            value = value[0]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path") or value.get("url")
        if type(value) is int:
            value = str(value)  # "7" of a spreadsheet
        if isinstance(value, bytes) and value:
            return self._keep(value)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"expected the name of an image, or the image, got {shown(value)}")
        if is_data_uri(value) or (_BASE64.fullmatch(value[:4096]) and len(value) > _LONGEST_NAME):
            return self._keep(embedded_file(value))
        if is_address(value):
            raise DataError("the image is an address, and nothing is downloaded: save it, and name the file")
        return self._look_for(beside, value.strip().replace("\\", "/"))

    def _look_for(self, beside: Path, name: str) -> Path:
        if len(name) > _LONGEST_NAME or "\0" in name:
            raise DataError(f"expected the name of an image, got {len(name):,} characters")
        if (beside, name) not in self._found:
            file, _, fragment = name.partition("#")
            endings = ("", *PICTURES) if not file.lower().endswith(PICTURES) else ("",)
            places = (folder / f"{file}{end}" for folder in (*self.folders, beside) for end in endings)
            whole = next((folder / name for folder in (*self.folders, beside) if (folder / name).is_file()), None)
            found = (
                whole or next((place for place in places if place.is_file()), None) or self._in_other_case(beside, file)
            )
            if found is None:
                raise DataError(f"no such image: {shown(name, 150)}; --images DIR says where images are")
            self._found[beside, name] = found if whole or not fragment else found.with_name(f"{found.name}#{fragment}")
        return self._found[beside, name]

    def _in_other_case(self, beside: Path, file: str) -> Path | None:
        """The one file of this name in capitals or not, as Windows finds it; its ending may be left out."""
        for folder in (*self.folders, beside):
            parent = (folder / file).parent
            if parent not in self._listed:
                names: dict[str, list[Path]] = {}
                for path in parent.iterdir() if parent.is_dir() else ():
                    names.setdefault(path.name.lower(), []).append(path)
                self._listed[parent] = names
            name = Path(file).name.lower()
            found = [path for end in ("", *PICTURES) for path in self._listed[parent].get(f"{name}{end}", [])]
            if len(found) == 1 and found[0].is_file():
                return found[0]
        return None

    def _keep(self, data: bytes) -> Path:
        ending = ".dcm" if data[128:132] == b"DICM" else _SUFFIXES.get(data[:2], ".img")
        path = self.out / (hashlib.sha256(data).hexdigest()[:20] + ending)
        if not path.is_file() or path.read_bytes() != data:  # a name does not prove what is in the file
            self.new(self.out)
            write_atomic(self.new(path), data)
        return path


def look_at(images: Iterable[Path], tell: Callable[[int, int], None]) -> tuple[dict[Path, str], dict[Path, str]]:
    """Decode images: of those that open the hash of their file, of the others why not. `tell(done, total)` counts."""
    images = list(images)
    hashes: dict[Path, str] = {}
    errors: dict[Path, str] = {}
    for done, image in enumerate(images, start=1):
        try:
            load_image(image)
            hashes[image] = content_hash(split_fragment(image)[0])
        except DataError as error:
            errors[image] = str(error)
        tell(done, len(images))
    return hashes, errors
