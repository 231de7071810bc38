"""What a program asks of the kernel, and when: system calls as strace(1) saw them.

The order in which files are flushed and renamed is a promise that no file shows afterwards. Errors of
the disk are made by the same tool (``inject=``), at the system call and not in our code.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import require_tool

TIMEOUT = 120
"""Seconds that a traced program may take."""

FLUSHES_AND_RENAMES = "trace=fsync,fdatasync,?rename,?renameat,?renameat2"


@dataclass(frozen=True)
class Call:
    """One system call.

    Attributes:
        name: ``fsync`` or ``rename``, whatever its variant.
        paths: The file, or source and target.
        result: What it returned, as strace writes it.
        began: Its place among all beginnings and ends.
        ended: The same, of its end.
    """

    name: str
    paths: tuple[str, ...]
    result: str
    began: int
    ended: int

    def before(self, other: Call) -> bool:
        """Return whether it had ended when `other` began."""
        return self.ended < other.began


def require_strace() -> None:
    """Skip the test where processes cannot be traced."""
    require_tool("strace")
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], check=False, capture_output=True)
    if tried.returncode != 0:
        pytest.skip(f"strace is not permitted here: {tried.stderr.decode().strip()}")


def trace(
    log: Path, command: Sequence[str], *, only: Path | None = None, inject: str | None = None
) -> tuple[list[Call], str]:
    """Run `command` to its good end, and return its flushes and renames, and what it printed.

    Args:
        log: A new file for strace to write.
        command: The program.
        only: Trace, and inject into, no other calls than those that have to do with this file.
        inject: What goes wrong, as in ``fsync:error=EIO``.
    """
    options = ["-P", str(only)] if only else []
    options += ["-e", f"inject={inject}"] if inject else []
    done = subprocess.run(
        ["strace", "-f", "-y", "-o", str(log), "-e", FLUSHES_AND_RENAMES, *options, *command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT,
        cwd=Path(__file__).parents[1],
    )
    return list(_calls(log.read_text().splitlines())), done.stdout


_WHOLE = re.compile(r"(\w+)\((.*)\) += (.*)")
_BEGUN = re.compile(r"(\w+)\((.*?) *<unfinished \.\.\.>")
_ENDED = re.compile(r"<\.\.\. \w+ resumed>(.*)\) += (.*)")
_PATH = re.compile(r'^\d+<(.*)>$|"([^"]*)"')


def _calls(lines: Sequence[str]) -> Iterator[Call]:
    begun: dict[str, tuple[int, str, str]] = {}
    for place, line in enumerate(lines):
        thread, _, text = line.partition(" ")
        text = text.strip()
        if match := _BEGUN.fullmatch(text):
            begun[thread] = (place, match[1], match[2])
        elif match := _ENDED.fullmatch(text):
            began, name, arguments = begun.pop(thread)
            yield _call(name, arguments + match[1], match[2], began, place)
        elif match := _WHOLE.fullmatch(text):
            yield _call(match[1], match[2], match[3], place, place)


def _call(name: str, arguments: str, result: str, began: int, ended: int) -> Call:
    paths = tuple(of_descriptor or quoted for of_descriptor, quoted in _PATH.findall(arguments))
    return Call("rename" if name.startswith("rename") else name, paths, result, began, ended)
