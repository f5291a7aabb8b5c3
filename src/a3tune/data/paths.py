"""File names out of annotations -> paths that stay inside their folder."""

from pathlib import Path, PurePosixPath

from a3tune.errors import DataError


def inside(folder: Path, name: object) -> Path:
    """The path of a file that an annotation names, relative to `folder`; backslashes count as slashes.

    Raises:
        DataError: the name is no text, is absolute, or leads out of the folder.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DataError(f"expected the name of a file, got {name!r:.60}")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise DataError(f"expected the name of a file inside {folder}, {name!r:.80} leads out of it")
    return folder / path
