"""What `make dist` has built: an sdist of what git tracks and nothing else, and a wheel of the package in it."""

import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MADE = {"PKG-INFO"}
"""In the sdist, and not tracked."""


def main() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    sdist, wheel = (ROOT / "dist" / f"a3tune-{version}{end}" for end in (".tar.gz", "-py3-none-any.whl"))
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()} - MADE
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.split("\0") if name}
    if inside != tracked:
        raise SystemExit(
            f"{sdist.name}: expected what git tracks; only there: {sorted(inside - tracked)}, missing: "
            f"{sorted(tracked - inside)}; commit or remove these files"
        )
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.startswith(f"a3tune-{version}.dist-info/")}
        licensed = f"a3tune-{version}.dist-info/licenses/LICENSE" in archive.namelist()
    package = {name.removeprefix("src/") for name in tracked if name.startswith("src/")}
    if packed != package or not licensed:
        raise SystemExit(f"{wheel.name}: expected LICENSE and the package, other: {sorted(packed ^ package)}")
    for path in (sdist, wheel):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
