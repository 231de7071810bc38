"""Paths as a configuration writes them: ``~`` and ``$VARIABLE`` stand for what they do in a shell.

systemd tells a service where things are by variables ($CREDENTIALS_DIRECTORY, $RUNTIME_DIRECTORY),
so a file without them would have to repeat what the unit says.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path
from string import Template

from proxy.config.wording import quote

_HOME = re.compile(r"\A~(?=/|\Z)")


def expand(text: str, environ: Mapping[str, str]) -> Path:
    """The path with ``~``, ``$NAME`` and ``${NAME}`` replaced; ``$$`` is a dollar sign.

    Raises:
        ValueError: A variable is not set, or no file can have that name.
    """
    if not text or "\0" in text:
        raise ValueError(f"{quote(text)} is not a path")
    try:
        return Path(Template(_HOME.sub("$HOME", text)).substitute(environ))
    except KeyError as error:
        raise ValueError(f"{quote(text)}: ${error.args[0]} is not set") from None
    except ValueError:
        raise ValueError(f'{quote(text)}: a "$" that begins no name is written "$$"') from None


def absolute(text: str, environ: Mapping[str, str]) -> Path:
    """The path, which must not depend on where the daemon was started.

    Raises:
        ValueError: It does, or `expand` refuses it.
    """
    path = expand(text, environ)
    if not path.is_absolute():
        raise ValueError(f'{quote(text)} must be absolute, or begin with "~/" or a variable')
    return path


def existing_file(text: str, environ: Mapping[str, str]) -> Path:
    """The path of a file that is there; whether it makes sense is for whoever reads it.

    Raises:
        ValueError: Nothing is there, or a directory, or `absolute` refuses it.
    """
    path = absolute(text, environ)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{quote(str(path))}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise ValueError(f"{quote(str(path))} is a directory")
    return path


def default_store(environ: Mapping[str, str]) -> Path:
    """Where the store is unless told: what systemd gives, else the user's cache directory.

    ``CacheDirectory=`` of systemd.exec(5) may name several, separated by colons; the first is ours.
    A relative $XDG_CACHE_HOME is ignored, as the XDG Base Directory Specification demands.

    Raises:
        ValueError: The environment says nothing.
    """
    if directories := environ.get("CACHE_DIRECTORY"):
        return Path(directories.split(":")[0])
    caches = [Path(environ.get("XDG_CACHE_HOME", "")), Path(environ.get("HOME", "")) / ".cache"]
    for cache in caches:
        if cache.is_absolute():
            return cache / "nix-cache-proxy"
    raise ValueError(
        "is missing, and none of $CACHE_DIRECTORY, $XDG_CACHE_HOME and $HOME says where caches are"
    )
