"""Where the time goes between the loss of a worker and the first step of the group that replaces it."""

from __future__ import annotations

import itertools

_STAGES = ("started", "imported", "joined", "resumed", "stepped")


class Recovery:
    """Times one recovery after the other.

    Args:
        restart: Name of the time from the loss to the first stage.
    """

    def __init__(self, restart: str = "restart") -> None:
        self._names = (restart, "imports", "rendezvous", "reload", "first step")
        self._times: list[float] = []  # of the loss, then of each stage since

    @property
    def next_stage(self) -> str | None:
        """The stage that comes next; None where nothing is being recovered from."""
        return _STAGES[len(self._times) - 1] if self._times else None

    def on_lost(self, now: float) -> None:
        """A worker was lost, at `now` seconds of the monotonic clock."""
        self._times = [now]

    def on_stage(self, stage: str, now: float) -> str | None:
        """A stage was reached; after the last one, a line that says where the time went."""
        if stage == _STAGES[0]:
            del self._times[1:]  # another group: the stages of the one before no longer count
        if stage != self.next_stage:
            return None
        self._times.append(now)
        if stage != _STAGES[-1]:
            return None
        spent = [after - before for before, after in itertools.pairwise(self._times)]
        self._times = []
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in zip(self._names, spent, strict=True))
        return f"training again {sum(spent):.1f} s after the loss was noticed: {parts}"
