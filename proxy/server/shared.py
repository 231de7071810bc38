"""Answers that many ask for, in files of memory, so that the kernel need not copy them for each.

write(2) copies an answer into the socket, which for a small NAR takes a third of the time of a request. From
a file sendfile(2) gives the socket the pages themselves. They are the client's until it has acknowledged
them, so they must never change again, and the date in an answer changes every second: a file is made for one
second, written once, and closed when the second is over. What is still on its way keeps its pages.
"""

from __future__ import annotations

import os
from typing import Final

LEAST: Final = 2**14
"""Bytes from which an answer is worth a file: up to half of that, copying takes no longer."""

MOST: Final = 2**16
"""Bytes up to which one sendfile(2) takes all of an answer: the pages of a pipe. Two take longer than one
write(2)."""

OFTEN: Final = 10
"""Requests for an answer within a second until it gets a file; making one takes what 3 of them gain."""

FILES: Final = 256
"""Descriptors, and so at most 16 MiB; closing them all takes less than a millisecond."""


class SharedAnswer:
    """An answer in a file of memory.

    Args:
        whole: The answer. It stays the same for as long as it is sent from the file.
        file: The descriptor of a file with the same content, owned from now on.
    """

    __slots__ = ("file", "whole")

    def __init__(self, whole: bytearray, file: int) -> None:
        self.whole = whole
        self.file = file
        """The descriptor; -1 once it is closed, so that nothing is sent from another's."""

    def send(self, socket: int) -> bytes:
        """Send it, and return what the socket did not take."""
        whole = self.whole
        try:
            sent = (
                os.write(socket, whole)
                if self.file < 0
                else os.sendfile(socket, self.file, 0, len(whole))
            )
        except OSError:
            return bytes(whole)  # the transport will find the same, and knows what to do
        return b"" if sent == len(whole) else bytes(whole[sent:])

    def close(self) -> None:
        """Close the file; safe to repeat. Sockets keep what they have of it."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class SharedAnswers:
    """The answers of this second that have files: no more than `FILES` of them."""

    def __init__(self) -> None:
        self._answers: list[SharedAnswer] = []

    def share(self, answer: bytearray) -> bytearray | SharedAnswer:
        """Return an answer with a file, or as it is where that gains nothing or cannot be had."""
        if not LEAST <= len(answer) <= MOST or len(self._answers) >= FILES:
            return answer
        try:
            shared = SharedAnswer(answer, os.memfd_create("answer"))
        except OSError:
            return answer  # no descriptors are left
        if not _fill(shared.file, answer):
            shared.close()
            return answer
        self._answers.append(shared)
        return shared

    def close(self) -> None:
        """Close all files: another second has begun."""
        for shared in self._answers:
            shared.close()
        self._answers.clear()


def _fill(file: int, content: bytearray) -> bool:
    """Write the content of a file, and tell whether there was memory for all of it."""
    try:
        return os.write(file, content) == len(content)
    except OSError:
        return False
