"""Importing the package and asking for help must not wait for PyTorch; what the package needs must be in it."""

import subprocess
import sys
from importlib.resources import files

import pytest

import a3tune

HEAVY = ("torch", "transformers", "peft", "matplotlib", "skimage", "scipy", "pyarrow")
INVOKE = "from typer.testing import CliRunner; from a3tune.cli import app; assert not CliRunner().invoke(app,"
DRY_RUNS = (
    ["demo", "--dry-run"],
    ["train", "--dry-run"],
    ["label", "rows.jsonl", "--out", "labels", "--dry-run"],
    ["eval", "rows.jsonl", "--adapter", "none", "--out", "run", "--dry-run"],
    ["ask", "Where?", "--image", "scan.png", "--dry-run"],
)
LOADED = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"


@pytest.mark.parametrize(
    "code",
    [
        "import a3tune",
        "import a3tune.config, a3tune.types, a3tune.errors",
        f"{INVOKE} ['--help']).exit_code",
        "; ".join(f"{INVOKE} {arguments}).exit_code" for arguments in DRY_RUNS),
    ],
)
def test_nothing_heavy_is_imported(code: str):
    result = subprocess.run([sys.executable, "-c", f"{code}; {LOADED}"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_help_does_not_wait_for_the_settings():
    code = f"{INVOKE} ['--help']).exit_code; import sys; print('pydantic' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_version_is_the_one_installed():
    from importlib.metadata import version

    assert a3tune.__version__ == version("a3tune")


@pytest.mark.parametrize("path", ["assets/demo/config.yaml", "assets/demo/recipe.yaml", "report/report.html.j2"])
def test_files_that_the_package_reads_are_in_it(path: str):
    assert files("a3tune").joinpath(path).is_file()
