"""What only POSIX systems have stands where Windows is asked for first."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import a3tune
from a3tune.machine.portable import flags, lock, unlock

SOURCE = Path(str(a3tune.__file__)).parent
MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "termios"}
NAMES = {"O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "fork", "getuid", "killpg", "mkfifo"}
ASKED_FIRST = {"machine/portable.py"}
HOLD = """
import sys
from a3tune.machine.portable import lock
file = open(sys.argv[1], "rb+")
lock(file.fileno(), wait=False)
print("held", flush=True)
sys.stdin.read()
"""


def test_nothing_else_needs_posix():
    found = []
    for path in SOURCE.rglob("*.py"):
        place = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                names += [node.attr]
            found += [f"{place}: {name}" for name in names if name in MODULES | NAMES and place not in ASKED_FIRST]
    assert found == []


def test_one_process_at_a_time_holds_a_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"what it holds")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], **pipes) as other, path.open("rb+") as file:  # type: ignore[call-overload]
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError):
            lock(file.fileno(), wait=False)
        other.stdin.close()
        lock(file.fileno(), wait=True)
        unlock(file.fileno())
        assert file.read() == b"what it holds"


def test_flags_that_the_system_lacks_are_none():
    assert flags("O_CREAT", "O_NO_SUCH_FLAG") & ~flags() == os.O_CREAT
