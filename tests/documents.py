"""Runs what the documentation shows: the blocks of a page, one after the other, in one folder.

Knows Markdown and what runs a block; what is in the folder is `test_documents.py`'s business.

A block runs unless the line before it is `<!-- not run: WHY -->`: then its commands, options, settings, imports and
files are looked up only (`lookups.py`), as always those of a line that begins with another program than `a3tune`.
"""

import ast
import json
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

from markdown_it import MarkdownIt
from typer.testing import CliRunner

from a3tune.cli import app
from a3tune.config import RunConfig, load_config, plain_yaml
from a3tune.data.rows import read_rows
from a3tune.errors import A3TuneError
from a3tune.reproduce.places import read_places
from lookups import PROGRAMS, Wrong, check_command, check_import, check_program

SHOWN = ("text", "bibtex")
"""Tags of blocks in which nothing can be wrong."""
BUDGET = {
    "demo": ("patients.train=1", "patients.validation=1", "patients.test=1", "training.max_steps=1"),
    "train": ("training.max_steps=2", "training.save_steps=2"),
    "eval": ("evaluation.max_new_tokens=4",),
    "ask": ("evaluation.max_new_tokens=4",),
}
"""Command -> settings that are added where a line does not set them itself."""
_SHELL = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>&1"}
_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")
_WHY = re.compile(r"<!-- not run: \S.* -->\s*")


@dataclass(frozen=True, slots=True)
class Block:
    page: str
    line: int
    """Of its first line in the file, from 1."""
    language: str
    text: str
    runs: bool

    def at(self, line: int = 0) -> str:
        """File:line of a line of the block, from 0."""
        return f"{self.page}:{self.line + line}"

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Where each command stands, and its words: without comments, continued lines joined."""
        lines = iter(enumerate(self.text.splitlines()))
        for number, line in lines:
            while line.endswith("\\"):
                line = line[:-1] + next(lines, (0, ""))[1]
            if words := shlex.split(line, comments=True):
                yield self.at(number), words


def read_blocks(path: Path, page: str) -> list[Block]:
    """Raises Wrong for a block that is indented or has no known tag."""
    blocks: list[Block] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for token in MarkdownIt().parse("\n".join(lines)):
        if token.type not in ("fence", "code_block"):
            continue
        assert token.map is not None
        where, first = f"{page}:{token.map[0] + 1}", lines[token.map[0]]
        if token.type == "code_block" or first.startswith(" "):
            raise Wrong(f"{where}: an indented block; begin it at the margin, with ``` and a tag")
        language = token.info.strip()
        if language not in (*_RUN, *SHOWN):
            raise Wrong(f"{where}: expected a block tagged {', '.join([*_RUN, *SHOWN])}, got {language!r}")
        before = lines[token.map[0] - 1] if token.map[0] else ""
        if before.startswith("<!--") and not _WHY.fullmatch(before):
            raise Wrong(f"{page}:{token.map[0]}: expected <!-- not run: WHY -->, got {before}")
        blocks.append(Block(page, token.map[0] + 2, language, token.content, not before.startswith("<!--")))
    return blocks


def run_page(blocks: list[Block], provide: Callable[[str], None]) -> None:
    """Runs or checks the blocks in the current folder.

    `provide` is called with a command or a program before it runs: it puts there what is named and no block has made.

    Raises Wrong at the first thing that fails.
    """
    module = ModuleType("shown")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        for block in blocks:
            if block.language in _RUN:
                _RUN[block.language](block, provide, module)
    finally:
        del sys.modules[module.__name__]


def _bash(block: Block, provide: Callable[[str], None], module: ModuleType) -> None:
    for where, words in block.commands():
        count = next((i for i, word in enumerate(words) if not _ASSIGNMENT.match(word)), len(words))
        environment = dict(word.split("=", 1) for word in words[:count])
        program, *rest = words[count:] or [""]
        if program == "a3tune":
            if _SHELL & set(rest):
                raise Wrong(f"{where}: one command on a line, without pipes; the test runs it without a shell")
            check_command(where, rest)
            if block.runs:
                provide(" ".join(rest))
                run_command(where, rest, environment)
        elif program in PROGRAMS:
            check_program(where, [program, *rest])
        else:
            raise Wrong(f"{where}: expected a3tune, {', '.join(PROGRAMS)}, got {program}")


def run_command(where: str, words: list[str], environment: Mapping[str, str] | None = None) -> None:
    """Runs `a3tune` with these words, on the budget of a test. Raises Wrong if it fails."""
    given = {word.split("=")[0] for word in words}
    added = [setting for setting in BUDGET.get(words[0], ()) if setting.split("=")[0] not in given]
    result = CliRunner().invoke(app, [*words, *added], env=environment)
    if result.exit_code:
        bug = None if isinstance(result.exception, SystemExit) else result.exception
        said = "".join(traceback.format_exception(bug)) if bug else result.output
        raise Wrong(f"{where}: {shlex.join(['a3tune', *words])}: exit code {result.exit_code}: {said.strip()}")


def _python(block: Block, provide: Callable[[str], None], module: ModuleType) -> None:
    try:
        code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")
    except SyntaxError as error:
        raise Wrong(f"{block.page}:{error.lineno}: {error.msg}") from None
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            check_import(block.at(node.lineno - 1), node)
    if not block.runs:
        return
    provide(block.text)
    try:
        exec(code, module.__dict__)
    except Exception as error:
        inside = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == block.page]
        said = "".join(traceback.format_exception(error))
        raise Wrong(f"{block.page}:{inside[-1] if inside else block.line}: {said}") from None


def _yaml(block: Block, provide: Callable[[str], None], module: ModuleType) -> None:
    path = _written(block)
    try:
        keys = set(plain_yaml.load(block.text) or ())
        if keys & {"models", "settings"}:
            provide(block.text)
            read_places(path, Path("places"))
        elif keys & {field.name for field in fields(RunConfig)}:
            load_config(path)
    except (plain_yaml.Error, A3TuneError) as error:
        raise Wrong(f"{block.at()}: {error}") from None


def _json(block: Block, provide: Callable[[str], None], module: ModuleType) -> None:
    try:
        values = [json.loads(line) for line in block.text.splitlines()]
    except json.JSONDecodeError:
        values = []
    try:
        if values and all(isinstance(value, dict) and "prompt" in value for value in values):
            read_rows(_written(block))
        elif not values:
            json.loads(block.text)
    except (json.JSONDecodeError, A3TuneError) as error:
        raise Wrong(f"{block.at()}: {error}") from None


def _written(block: Block) -> Path:
    """The block as a file; of YAML the first line may say its name (`# settings.yaml`), for the blocks below."""
    named = re.match(r"# ([\w./-]+\.ya?ml)\n", block.text)
    path = Path(named[1] if named else f"block-{block.line}.{block.language}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text)
    return path


_RUN: dict[str, Callable[[Block, Callable[[str], None], ModuleType], None]] = {
    "bash": _bash,
    "python": _python,
    "yaml": _yaml,
    "json": _json,
}
