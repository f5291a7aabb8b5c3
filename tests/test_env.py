"""What `a3tune env` prints: enough to help, nothing about who asks."""

import getpass
import os
import platform
import socket
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from a3tune import __version__
from a3tune.cli import app
from a3tune.commands.env import extras


def test_it_says_versions_and_no_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    said = CliRunner().invoke(app, ["env"])
    assert said.exit_code == 0, said.output
    for expected in (f"a3tune {__version__}", platform.python_version(), f"torch {version('torch')}", "accelerators:"):
        assert expected in said.output
    assert "extra app: gradio" in said.output or "extra app: no gradio" in said.output
    for private in ("hf_secret", str(Path.home()), os.sep + "usr", socket.gethostname()):
        assert private not in said.output
    assert getpass.getuser() == "root" or getpass.getuser() not in said.output


def test_extras_are_read_as_metadata_states_them():
    stated = ["torch>=2.6", 'gradio<7,>=6.31; extra == "app"', "x; python_version < '4' and extra == 'app'"]
    assert extras(stated) == {"app": ["gradio", "x"]}
