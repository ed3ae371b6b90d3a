"""Saving checkpoints, each whole or absent, and finding the newest sound one.

A checkpoint is a folder `checkpoints/step-000001000` (`vaedist.runs.checkpoint_manifest`). It is written under a
temporary name and forced to the disk; `guard` checks that the run is still ours; then one rename makes it visible, and
the folder that holds the name is forced to the disk. A process killed at any moment leaves either a whole checkpoint or
a temporary folder, which the next holder of the run's lock deletes. This also stops a process that was suspended
between `guard` and the rename while another took the run over: the folder it would rename is gone.

Nothing points at the newest checkpoint: the folder is listed, newest first, and the first checkpoint that matches its
manifest is taken. A damaged one is named in a warning and renamed to `damaged-...`, so that it cannot become the newest
again. A step saved twice (after a resume at that step) gets a second folder `step-000001000-1`: commits only ever add.

Only the process that holds the run's lock uses `Checkpoints`; commands that only read use `load_checkpoint`.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from vaedist.core.errors import UserError
from vaedist.core.files import TEMPORARY, as_json, disk_errors, replace_file, sync_folder, temporary
from vaedist.runs.checkpoint_manifest import (
    DamagedCheckpoint,
    LoadedCheckpoint,
    assert_plain,
    read_checkpoint,
    write_checkpoint,
)
from vaedist.runs.checkpoint_paths import BEST, best_checkpoint, list_checkpoints, step_and_serial

log = logging.getLogger("vaedist")


class Best(NamedTuple):
    """The validation result that made a checkpoint the best so far."""

    metric: str
    value: float


class Checkpoints:
    """The checkpoints of one run, for the process that holds its lock.

    Args:
        run_folder: The run folder; `checkpoints` is made below it.
        keep: Newest checkpoints that `prune` leaves (the best one is left besides).
    """

    def __init__(self, run_folder: Path, keep: int = 2) -> None:
        self.run_folder = Path(run_folder)
        self.folder = self.run_folder / "checkpoints"
        self.keep = keep
        with disk_errors("checkpoints", self.run_folder):
            self.folder.mkdir(mode=0o700, exist_ok=True)

    def commit(self, state: Mapping[str, Any], step: int, *, guard: Callable[[], None]) -> Path:
        """Write `state` as the checkpoint of `step`: whole, or not at all.

        Args:
            state: Tensors and plain values (numbers, text, None, lists, tuples, dicts of these).
            step: Optimizer steps done.
            guard: Raises if the run is no longer ours (`RunLock.check`); called right before the rename.

        Returns:
            The checkpoint's folder.

        Raises:
            UserError: there is no room, or what `guard` raises. Older checkpoints are intact.
        """
        assert_plain(state, "state")
        target = self._free_name(step)
        scratch = temporary(target)
        try:
            with disk_errors(f"the checkpoint of step {step}", self.folder):
                scratch.mkdir(mode=0o700)
                write_checkpoint(scratch, state, step)
                guard()
                os.rename(scratch, target)
                sync_folder(self.folder)
        except FileNotFoundError:
            guard()  # the likely reason: another process took the run over and deleted temporary files
            raise UserError(
                f"the checkpoint of step {step} vanished from {self.folder} while it was written: does "
                "another process clean that folder? Run the same command again to continue"
            ) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return target

    def newest(self) -> LoadedCheckpoint | None:
        """The newest sound checkpoint, or None for a run without one.

        Removes what killed writes left behind. A damaged checkpoint is named, put aside and passed over.

        Raises:
            UserError: there were checkpoints, but none is sound: starting over would overwrite the run's record.
        """
        self.remove_temporary_files()
        for path in reversed(list_checkpoints(self.folder)):
            try:
                return read_checkpoint(path)
            except DamagedCheckpoint as reason:
                aside = temporary(path.with_name(f"damaged-{path.name}"))
                aside = aside.with_name(aside.name.removeprefix(TEMPORARY))
                with disk_errors("a damaged checkpoint under another name", self.folder):
                    os.rename(path, aside)
                log.warning(
                    "checkpoint %s is damaged (%s): passed over for the one before, put aside as %s",
                    path,
                    reason,
                    aside.name,
                )
        damaged = sorted(path.name for path in self.folder.glob("damaged-*"))
        if damaged:
            raise UserError(
                f"no sound checkpoint is left in {self.folder}, only {', '.join(damaged)}: start a new run with "
                "--new-run, or remove these to start this one over"
            )
        return None

    def remove_temporary_files(self) -> None:
        """Delete temporary files and folders of ours, left by writes that were killed."""
        for folder in (self.folder, self.run_folder):
            for path in folder.glob(f"{TEMPORARY}*"):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def mark_best(self, path: Path, best: Best) -> None:
        """Point the run's `best.json` at a committed checkpoint."""
        pointer = {"checkpoint": path.name, "metric": best.metric, "value": best.value}
        with disk_errors(BEST, self.run_folder):
            replace_file(self.run_folder / BEST, as_json(pointer))

    def prune(self) -> None:
        """Delete all checkpoints but the newest `keep` and the best."""
        best = best_checkpoint(self.run_folder)
        for path in list_checkpoints(self.folder)[: -self.keep]:
            if path != best:
                # Renamed first: a half-deleted checkpoint must not look like a damaged one.
                doomed = temporary(path)
                os.rename(path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _free_name(self, step: int) -> Path:
        taken = {
            (number, serial)
            for path in list_checkpoints(self.folder)
            for number, serial in [step_and_serial(path)]
        }
        serial = next(serial for serial in range(len(taken) + 1) if (step, serial) not in taken)
        return self.folder / (f"step-{step:09d}" + (f"-{serial}" if serial else ""))


class Committer:
    """Commits in one background thread, one at a time, so that training does not wait for the disk.

    Errors of a commit are raised in the training thread, by the next `submit` or `join`.

    Args:
        checkpoints: Where to.
        guard: Raises if the run is no longer ours (`RunLock.check`); called before anything visible changes.
    """

    def __init__(self, checkpoints: Checkpoints, guard: Callable[[], None]) -> None:
        self.checkpoints, self.guard = checkpoints, guard
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vaedist-commit")
        self._pending: Future[None] | None = None

    def submit(self, state: Mapping[str, Any], step: int, best: Best | None = None) -> None:
        """Wait for the commit before, then start this one: commit, point `best` at it if given, prune.

        `state` must be the committer's own: it may not change until the next `submit` or `join`.
        """
        self.join()
        self._pending = self._thread.submit(self._work, state, step, best)

    def join(self, wait: bool = True) -> None:
        """Wait until nothing is being written, or only look; raises what the last commit raised."""
        if self._pending is not None and (wait or self._pending.done()):
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """`join`, and end the thread."""
        try:
            self.join()
        finally:
            self._thread.shutdown()

    def _work(self, state: Mapping[str, Any], step: int, best: Best | None) -> None:
        path = self.checkpoints.commit(state, step, guard=self.guard)
        self.guard()
        if best is not None:
            self.checkpoints.mark_best(path, best)
        self.checkpoints.prune()


def load_checkpoint(path: Path) -> LoadedCheckpoint:
    """The checkpoint in folder `path`, verified against its manifest, on the CPU.

    Raises:
        UserError: it is damaged or was written by a newer vaedist.
    """
    try:
        return read_checkpoint(Path(path))
    except DamagedCheckpoint as reason:
        others = ", ".join(str(other) for other in list_checkpoints(Path(path).parent) if other != Path(path))
        way = f"give another: {others}" if others else "there is no other: train again"
        raise UserError(f"checkpoint {path} is damaged ({reason}); {way}") from None
