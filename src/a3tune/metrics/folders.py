"""Local folders of weights and corpora that metrics need, and packages that need an environment of their own.

Nothing is ever downloaded: what is missing raises ModelError, which says how to get it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from a3tune.errors import ModelError

MAX_TOKENS = 512
"""Longest text that BERT and RoBERTa read; what follows is not scored."""
MAX_WORDS = 512
"""Longest text that is sent to a package: the memory of RadGraph grows with the square of it."""
_SCRIPTS = Path(__file__).parent / "scripts"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUTF8": "1"}


def required(folder: Path | None, files: Sequence[str], how: str) -> Path:
    """The folder, if it holds all these files. Raises ModelError with `how` to get them."""
    if folder is None:
        raise ModelError(f"no folder was given; {how}")
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise ModelError(f"{folder}: expected {', '.join(files)}, missing: {', '.join(missing)}; {how}")
    return folder


def read_config(folder: Path) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of a text encoder. Raises ModelError if they cannot be read."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return config, AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: expected configuration and tokenizer of a text encoder: {error}") from error


def run_script(name: str, folder: Path, texts: Sequence[Sequence[str]], how: str) -> Any:
    """What a package answers to texts, each cut after `MAX_WORDS` words; it may need older libraries than ours.

    `scripts/{name}.py` runs offline in `folder`, so that names of models are found as paths in it, with the Python of
    `folder/venv` if there is one, else with ours. Raises ModelError with the last line that it wrote, and `how`.
    """
    inside = ("Scripts/python.exe",) if os.name == "nt" else ("bin/python",)
    own_python = folder.absolute().joinpath("venv", *inside)
    python = str(own_python) if own_python.exists() else sys.executable
    payload = json.dumps([[" ".join(text.split()[:MAX_WORDS]) for text in column] for column in texts])
    done = subprocess.run(
        [python, str(_SCRIPTS / f"{name}.py")],
        input=payload,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd=folder,
        env=os.environ | _OFFLINE,
        check=False,
    )
    if done.returncode:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}")
        raise ModelError(f"{name} in {folder} with {python} failed: {last}; {how}")
    return json.loads(done.stdout.splitlines()[-1])
