"""What runs are called beside each other: as the user says (`NAME=FOLDER`), else by what tells their paths apart."""

from collections.abc import Sequence
from pathlib import Path, PurePath

from a3tune.errors import RunError
from a3tune.run.folder import RunFolder


def told_apart(folders: Sequence[Path]) -> list[str]:
    """For each folder the last part of its path, with as many before it as it takes to be the only one of that name.

    The same folder twice has the same name twice.
    """
    paths = [folder.resolve().parts for folder in folders]

    def name(own: tuple[str, ...]) -> str:
        others = [path for path in paths if path != own]
        count = 1
        while any(path[-count:] == own[-count:] for path in others):
            count += 1
        return str(PurePath(*own[-count:]))

    return [name(path) for path in paths]


def named_runs(given: Sequence[str | Path]) -> dict[str, RunFolder]:
    """Run folders by what they are called, in their order.

    Args:
        given: folders; of texts also `NAME=FOLDER`, with any name that holds no `/`. A folder that is there is one,
            whatever its name.

    Raises RunError for a folder that is no run's, and when two are called alike.
    """
    pairs = [_name_and_folder(one) for one in given]
    apart = iter(told_apart([folder for name, folder in pairs if not name]))
    names = [name or next(apart) for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RunError(
            f"runs: expected different names, got {twice} twice among {', '.join(map(str, given))}; give each folder "
            "once, or a name of its own: NAME=FOLDER"
        )
    return {name: RunFolder.open(folder) for name, (_, folder) in zip(names, pairs, strict=True)}


def _name_and_folder(given: str | Path) -> tuple[str, Path]:
    name, mark, folder = str(given).partition("=")
    if isinstance(given, Path) or not mark or "/" in name or Path(given).is_dir():
        return "", Path(given)
    if not name.strip() or not folder:
        raise RunError(f"{given}: expected NAME=FOLDER, with a name and the folder of a run")
    return name, Path(folder)
