"""Whether the disk keeps anything, and when to look again. Decides; touches nothing.

Whether it does is found out by a probe: after every failure, and while nothing is kept after growing
pauses, so that a disk which has room again is used again by itself. A disk that fails as soon as it has
recovered is left alone for longer and longer.
"""

from __future__ import annotations

FIRST_PAUSE = 1.0
"""Seconds after a failure until the disk is looked at again."""

LONGEST_PAUSE = 60.0
"""Seconds that the pauses grow to; a disk that was well for that long has recovered for good."""


class Health:
    """What is known of the disk.

    Attributes:
        reason: Why nothing is kept; empty while the disk works.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._pause = FIRST_PAUSE
        self._well_since = float("-inf")

    def probed(self, now: float, reason: str) -> bool:
        """Take in what a probe found: why nothing can be kept, or an empty text.

        Returns:
            Whether the disk failed until now and works again, or the other way round.
        """
        changed = bool(reason) != bool(self.reason)
        if not reason:
            if changed:
                self._well_since = now
        elif not changed:
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
        elif now - self._well_since >= LONGEST_PAUSE:
            self._pause = FIRST_PAUSE
        else:
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
        self.reason = reason
        return changed

    @property
    def pause(self) -> float:
        """Seconds to wait before the disk is looked at again, while it fails."""
        return self._pause
