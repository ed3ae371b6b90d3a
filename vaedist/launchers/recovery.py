"""Where the time goes between the loss of a worker and the first step of the group that replaces it."""

from __future__ import annotations

import itertools

_STAGES = ("started", "imported", "joined", "resumed", "stepped")


class Recovery:
    """One group after the other, the stages of each told as they are reached.

    Args:
        restart: What the time from the loss to the first stage was spent on.
    """

    def __init__(self, restart: str = "restart") -> None:
        self._spent_on = (restart, "imports", "rendezvous", "reload", "first step")
        self._marks: list[float] = []  # of the loss, then of each stage since

    @property
    def awaited(self) -> str | None:
        """The stage that comes next; None where nothing is being recovered from."""
        return _STAGES[len(self._marks) - 1] if self._marks else None

    def lost(self, now: float) -> None:
        """A worker was lost, at `now` seconds of the monotonic clock."""
        self._marks = [now]

    def reached(self, stage: str, now: float) -> str | None:
        """Take in a stage; after the last one, the line that says where the time went."""
        if stage == _STAGES[0]:
            del self._marks[1:]  # another group: what the one before had reached no longer counts
        if stage != self.awaited:
            return None
        self._marks.append(now)
        if stage != _STAGES[-1]:
            return None
        spent = [after - before for before, after in itertools.pairwise(self._marks)]
        self._marks = []
        told = ", ".join(f"{what} {took:.1f} s" for what, took in zip(self._spent_on, spent, strict=True))
        return f"training again {sum(spent):.1f} s after the loss was noticed: {told}"
