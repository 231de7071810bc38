"""Check everything in the store again: signatures, sizes and hashes.

It runs on a thread of its own, in the order of hash parts, and remembers how far it got, so that it goes
on there after an interruption. Hash parts are looked at one first letter after the other: a list of all
names of a large store would take more memory than the daemon.

It gives way to others: by the lowest priority where it has the process to itself, and by resting where it
shares one with those who serve. There a low priority would do harm: a thread that is not given the
processor while it has the interpreter's lock holds up all others.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final, Literal

from proxy.errors import ParseError, TrustError, UnverifiableError
from proxy.nix import narinfo
from proxy.nix.hashes import NIX32_ALPHABET
from proxy.nix.nar import NarVerifier
from proxy.nix.nar_name import NarName
from proxy.nix.narinfo import NarInfo
from proxy.nix.store_path import HASH_PART_LENGTH, HashPart, parse_hash_part
from proxy.nix.trust import Trust
from proxy.store.layout import Layout
from proxy.store.scan import NARINFO_SUFFIX

PIECE: Final = 2**20
"""Bytes read and hashed in one go."""

NOTE_EVERY: Final = 5.0
"""Seconds of work that an interruption may cost."""

LOWEST_PRIORITY: Final = 19
"""For nice(2); the kernel derives the priority of disk accesses from it (ioprio_set(2))."""

REST: Final = 0.005
"""Seconds of rest after each piece: more than half of the time."""

NAMES: Final = 256
"""Names of files looked at before a short rest."""

SHORT_REST: Final = 0.0001
"""Seconds in which others get hold of the interpreter."""

Outcome = Literal["sound", "damaged", "untrusted"]
"""``untrusted``: whole, but no key that is trusted today has signed it; it is not served, and stays."""


@dataclass(frozen=True, slots=True)
class Checked:
    """One file, or a NAR with its narinfo: ``what`` was found out, and the bytes that were read."""

    what: str
    outcome: Outcome
    reason: str
    size: int


class _StoppedError(Exception):
    """Somebody wants it to end early."""


class Verification:
    """One pass over a store. Used on one thread.

    Args:
        layout: The store folder.
        trust: Whose signatures count.
        set_aside: Takes a damaged path out of the store: the hash part, its NAR if there is one, and why.
        stop: Set by whoever wants it to end early; it goes on there the next time.
        shared: Whether others use this process, who must not notice.
    """

    def __init__(
        self,
        layout: Layout,
        trust: Trust,
        set_aside: Callable[[HashPart, NarName | None, str], object],
        stop: threading.Event,
        *,
        shared: bool,
    ) -> None:
        self._layout = layout
        self._trust = trust
        self._set_aside = set_aside
        self._stop = stop
        self._shared = shared
        self._rest = REST if shared else 0.0

    def count(self) -> int:
        """Return how many paths there are left to check."""
        done = self.begin
        return sum(
            rest == NARINFO_SUFFIX and hash_part > done
            for hash_part, rest in self._named(self._layout.root, "")
        )

    @property
    def begin(self) -> str:
        """The hash part behind which it goes on; empty at the beginning."""
        try:
            return parse_hash_part(self._layout.verified.read_text("ascii").strip())
        except (OSError, ValueError):
            return ""

    def start_over(self) -> None:
        """Forget how far the last one got."""
        with contextlib.suppress(OSError):
            self._layout.verified.unlink(missing_ok=True)

    def run(self) -> Iterator[Checked]:
        """Check one path after the other, and yield what was found.

        Raises:
            OSError: The store folder cannot be read.
        """
        if not self._shared:
            self._give_way()
        done, noted = self.begin, time.monotonic()
        try:
            for first in NIX32_ALPHABET[NIX32_ALPHABET.find(done[:1]) if done else 0 :]:
                for hash_part, nars in sorted(self._contents(first).items()):
                    if hash_part <= done:
                        continue
                    self._pause()
                    yield from self._check(hash_part, nars)
                    done = hash_part
                    if time.monotonic() - noted > NOTE_EVERY:
                        self._note(done)
                        noted = time.monotonic()
        except _StoppedError:
            self._note(done)
        else:
            self.start_over()

    def _give_way(self) -> None:
        """Let everybody else on this machine go first."""
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        except PermissionError:  # a filter of system calls, such as that of our own unit
            self._rest = REST

    def _pause(self) -> None:
        """Rest, or stop if somebody wants that."""
        if self._stop.is_set():
            raise _StoppedError
        time.sleep(self._rest)

    def _note(self, done: str) -> None:
        with contextlib.suppress(OSError):  # a disk that takes nothing costs a repetition
            self._layout.verified.write_text(f"{done}\n", "ascii")

    def _check(self, hash_part: HashPart, nars: list[NarName]) -> Iterator[Checked]:
        """Check a path, and then NARs of it that its narinfo does not lead to."""
        narinfo_or_verdict = self._read_narinfo(hash_part)
        checked = None
        if isinstance(narinfo_or_verdict, Checked):
            yield narinfo_or_verdict
        elif narinfo_or_verdict is not None:
            checked = narinfo_or_verdict.nar_name
            yield from self._check_nar(checked, narinfo_or_verdict)
        for name in nars:
            if name != checked:
                yield from self._check_nar(name, None)

    def _read_narinfo(self, hash_part: HashPart) -> NarInfo | Checked | None:
        """Return a narinfo that can be believed, or what is wrong with it; None if there is none."""
        path = self._layout.narinfo(hash_part)
        try:
            info = narinfo.parse(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ParseError) as error:
            return self._damaged(path, hash_part, str(error))
        if info.url != f"nar/{info.nar_name}":
            return self._damaged(path, hash_part, f"it leads to {info.url}")
        try:
            self._trust.verify(info, hash_part)
        except TrustError as error:
            if self._trust.is_changed(info, error):
                return self._damaged(path, hash_part, str(error))
            return Checked(path.name, "untrusted", str(error), 0)
        return info

    def _check_nar(self, name: NarName, info: NarInfo | None) -> Iterator[Checked]:
        """Check a NAR against its narinfo, or if it has none against the NarHash in its name."""
        path = self._layout.nar(name)
        try:
            with path.open("rb", buffering=0) as file:
                verdict = self._judge(file, name, info)
                if verdict.outcome == "damaged" and self._is_replaced(file, name, info):
                    return
        except FileNotFoundError:
            # Evicted meanwhile, unless the narinfo is still there, which would have gone first.
            narinfo_stays = info is not None and self._layout.narinfo(name.hash_part).exists()
            if not narinfo_stays or path.exists():
                return
            verdict = Checked(str(name), "damaged", "its NAR is not there", 0)
        except OSError as error:
            verdict = Checked(str(name), "damaged", str(error), 0)
        if verdict.outcome == "damaged":
            self._set_aside(name.hash_part, name, verdict.reason)
        yield verdict

    def _judge(self, file: FileIO, name: NarName, info: NarInfo | None) -> Checked:
        seen = 0
        try:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_NOREUSE)  # others' pages stay
            verifier = _verifier(name, info)
            while piece := file.read(PIECE):
                seen += len(piece)
                verifier.feed(piece)
                self._pause()
            verifier.finish()
        except UnverifiableError as error:
            return Checked(str(name), "untrusted", str(error), 0)
        except (OSError, TrustError) as error:
            return Checked(str(name), "damaged", str(error), seen)
        return Checked(str(name), "sound", "", seen)

    def _is_replaced(self, file: FileIO, name: NarName, info: NarInfo | None) -> bool:
        """Tell whether somebody has taken away meanwhile what was judged, and verified what is there now."""
        try:
            now = self._layout.nar(name).stat()
            if not os.path.samestat(os.fstat(file.fileno()), now):
                return True
            text = self._layout.narinfo(name.hash_part).read_bytes() if info else b""
            return info is not None and narinfo.parse(text) != info
        except FileNotFoundError:
            return True
        except (OSError, ParseError):
            return False

    def _damaged(self, path: Path, hash_part: HashPart, reason: str) -> Checked:
        """Take out a narinfo."""
        self._set_aside(hash_part, None, reason)
        return Checked(path.name, "damaged", reason, 0)

    def _contents(self, first: str) -> dict[HashPart, list[NarName]]:
        """Return all paths whose hash part begins with a letter, and the NARs of each."""
        found: dict[HashPart, list[NarName]] = {}
        for hash_part, rest in self._named(self._layout.root, first):
            if rest == NARINFO_SUFFIX:
                found[hash_part] = []
        for hash_part, rest in self._named(self._layout.nars, first):
            with contextlib.suppress(ParseError):
                found.setdefault(hash_part, []).append(NarName.parse(f"{hash_part}{rest}"))
        return found

    def _named(self, folder: Path, first: str) -> Iterator[tuple[HashPart, str]]:
        """Yield the hash parts that files are named after, with the rest of their names."""
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if self._shared and number % NAMES == 0:
                    time.sleep(SHORT_REST)
                if entry.name.startswith(first):
                    with contextlib.suppress(ParseError):
                        rest = entry.name[HASH_PART_LENGTH:]
                        yield parse_hash_part(entry.name[:HASH_PART_LENGTH]), rest


def _verifier(name: NarName, info: NarInfo | None) -> NarVerifier:
    if info is None:
        return NarVerifier(compression=name.compression, nar_hash=name.nar_hash, nar_size=None)
    return NarVerifier(
        compression=info.compression,
        nar_hash=info.nar_hash,
        nar_size=info.nar_size,
        file_hash=info.file_hash,
        file_size=info.file_size,
    )
