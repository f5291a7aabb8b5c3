"""Looks up what the documentation names: commands, options, settings, imports, files. Runs nothing."""

import ast
import importlib
import re
import shlex
import tomllib
from contextlib import redirect_stderr
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown_it import MarkdownIt

from a3tune.cli import app
from a3tune.config import RunConfig, load_config
from a3tune.decoding import make_decoder
from a3tune.demo.plan import plan_demo
from a3tune.errors import A3TuneError
from a3tune.labels.propose import PROPOSERS
from a3tune.labels.rank import VISUAL_PROMPTS

ROOT = Path(__file__).parents[1]
PROGRAMS = ("accelerate", "cd", "hf", "make", "pip", "python", "ray", "tensorboard")
"""What a line may begin with besides `a3tune`."""
FILES = ("jpg", "json", "jsonl", "md", "npz", "parquet", "png", "py", "yaml")
SECTIONS = {field.name for field in fields(RunConfig)} - {"output"}


class Wrong(pytest.fail.Exception):
    """What a page shows is not so. The message begins with file:line; it is all that a failed test prints."""

    def __init__(self, message: str) -> None:
        super().__init__(message, pytrace=False)


def check_command(where: str, words: list[str]) -> None:
    """Looks up the command, its options and settings, and the names that these choose from. Runs nothing."""
    said: dict[str, Any] = {}
    errors = StringIO()
    try:
        with redirect_stderr(errors):
            _listening(typer.main.get_command(app), (), said)(words, prog_name="a3tune")
    except SystemExit as exit:
        if exit.code:
            message = re.sub(r"[─-╿\s]+", " ", errors.getvalue()).strip()
            raise Wrong(f"{where}: {shlex.join(['a3tune', *words])}: {message}") from None
    settings = said.get("overrides") or said.get("setting") or []
    try:
        if said.get("command") == ("demo",):
            plan_demo(said["out"], settings)
            return
        config = load_config(None, settings)
        for name in [*(said.get("decode") or []), config.evaluation.decode]:
            if name != "all":
                make_decoder(name)
    except A3TuneError as error:
        raise Wrong(f"{where}: {error}") from None
    for key, name, known in (
        ("labels.proposer", config.labels.proposer, PROPOSERS),
        ("labels.visual_prompt", config.labels.visual_prompt, VISUAL_PROMPTS),
    ):
        if name not in known:
            raise Wrong(f"{where}: {key}: expected one of {', '.join(known)}, got {name}")


def _listening(command: Any, path: tuple[str, ...], said: dict[str, Any]) -> Any:
    """The command line, whose commands do nothing but write down what they were told."""
    for name, inner in getattr(command, "commands", {}).items():
        _listening(inner, (*path, name), said)
    if not hasattr(command, "commands"):
        command.callback = lambda **parameters: said.update(parameters, command=path)
    return command


def check_program(where: str, words: list[str]) -> None:
    """Looks up what other programs are told of ours: files, their options, targets of make, extras of pip; and what
    the client of the Hugging Face Hub is told."""
    program, *rest = words
    if program == "hf":
        _check_hub_command(where, rest)
    if "-m" in rest and "a3tune" in rest:
        after = rest.index("a3tune")
        check_command(where, rest[after + 1 :])
        rest = rest[:after]
    for word in rest:
        name = word.split("=")[0]
        if (
            word.startswith(("benchmarks/", "examples/", "experiments/", "recipes/", "tests/"))
            and not (ROOT / word).exists()
        ):
            raise Wrong(f"{where}: {word}: no such file")
        if program == "make" and not name.isupper() and f"\n{name}:" not in (ROOT / "Makefile").read_text():
            raise Wrong(f"{where}: make {name}: no such target")
        if program == "pip" and (found := re.fullmatch(r"(?:a3tune|\.)\[(.*)\]", word)):
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            if unknown := set(found[1].split(",")) - set(known):
                raise Wrong(f"{where}: {word}: expected extras of {', '.join(known)}, got {', '.join(unknown)}")
    if program == "python" and rest and (ROOT / rest[0]).is_file():
        source = (ROOT / rest[0]).read_text()
        for option in [word.split("=")[0] for word in rest if word.startswith("--")]:
            if f'"{option}"' not in source:
                raise Wrong(f"{where}: {rest[0]}: no option {option}")


def _check_hub_command(where: str, words: list[str]) -> None:
    """Looks up a command of the Hub's client, and its options, in its help."""
    from click.testing import CliRunner
    from huggingface_hub.cli.hf import app as hub

    command: Any = hub
    shown = CliRunner().invoke(command, [words[0], "--help"], env={"COLUMNS": "200"})
    known = re.findall(r"--[\w-]+", shown.output)
    if unknown := [word for word in words if word.startswith("--") and word not in known]:
        raise Wrong(f"{where}: hf {words[0]}: no option {', '.join(unknown)}")
    if shown.exit_code:
        raise Wrong(f"{where}: hf {words[0]}: no such command")


def check_import(where: str, node: ast.Import | ast.ImportFrom) -> None:
    """Of our own names only: others need not be installed."""
    base = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
    for name in [alias.name for alias in node.names]:
        dotted = f"{base}.{name}".lstrip(".")
        if dotted.split(".")[0] == "a3tune" and not resolves(dotted):
            raise Wrong(f"{where}: {dotted}: no such name")


def resolves(dotted: str) -> bool:
    """Whether there is such a module, or such a name in a module."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def check_prose(path: Path, page: str) -> int:
    """What the text names in `...`: commands with options, settings, names of the package, files of the project.

    Returns how many it found. Raises Wrong for those that are not there.
    """
    count, absent = 0, []
    for token in MarkdownIt().parse(path.read_text(encoding="utf-8")):
        for child in token.children or ():
            if child.type == "code_inline":
                assert token.map is not None
                known = _names(child.content)
                count += known is True
                if known is False:
                    absent.append(f"{page}:{token.map[0] + 1} or below: `{child.content}`: no such thing")
    if absent:
        raise Wrong("\n".join(absent))
    return count


def _names(text: str) -> bool | None:
    """Whether there is what the text names; None if it is none of the things that are looked up."""
    if text.startswith("a3tune "):
        return _has_command(text.split()[1:])
    found = re.match(r"a3tune(\.\w+)+", text)
    if found and text.rpartition(".")[2] not in FILES:
        return resolves(found[0])
    if re.fullmatch(r"(src|docs|tests|benchmarks|recipes|examples|experiments)/[\w./-]+", text):
        return (ROOT / text).exists()
    found = re.fullmatch(r"([a-z]+)\.([a-z_]+)((=|\.[A-Za-z_]+=).*)?", text)
    if found and found[1] in SECTIONS and found[2] not in FILES:
        return hasattr(getattr(RunConfig(), found[1]), found[2])
    return None


def _has_command(words: list[str]) -> bool:
    """Arguments may be missing or stand for something, as in `a3tune label export STORE ...`."""
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            if command.name == "label":  # `label DATA` is `label make DATA`
                command = command.commands["make"]
            elif not words[0].startswith("-"):
                return False
            break
        command, words = command.commands[words[0]], words[1:]
    options = {name for parameter in getattr(command, "params", ()) for name in parameter.opts}
    return options >= {word for word in words if re.match(r"--\w", word)} - {"--help", "--version"}
