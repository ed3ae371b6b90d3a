"""Checkpoints that are whole or absent: how they are committed, found again, kept and read.

A checkpoint is a folder `checkpoints/step-000001000` with `state.pt` (tensors and plain values, `torch.save`)
and `manifest.json` (every file's size and sha256). It is written under a temporary name; its files are forced to
the disk; `guard` is asked whether the run is still ours; then one rename makes it visible, and the folder that
holds the name is forced to the disk. A process killed at any moment leaves either a whole checkpoint or a
temporary folder, which the next holder of the run's lock sweeps. That sweep is also what stops a process that
slept through a takeover exactly between `guard` and the rename: the folder it would rename is gone.

Nothing points at the newest checkpoint: the folder is scanned, newest first, and the first one whose manifest
holds is the newest. One that does not is named in a warning, put aside as `damaged-...` and passed over, so that
it cannot come back as the newest of a history that has moved on without it. A step saved twice (after a resume
at that very step) gets a second folder `step-000001000-1`: commits only ever add.

Reading never runs code: `torch.load(weights_only=True)` on an archive whose members are stored uncompressed, so
a stranger's file can neither act nor unfold to more than its own size.

Only the process that holds the run's lock calls `Checkpoints`; doors that only read use `resolve` and `load`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from vaedist.core.errors import UserError
from vaedist.core.files import (
    TEMPORARY,
    as_json,
    disk_errors,
    replace_file,
    sync_folder,
    temporary,
    write_synced,
)

FORMAT = 1
STATE = "state.pt"
MANIFEST = "manifest.json"
BEST = "best.json"
_NAME = re.compile(r"step-(\d{9,})(?:-(\d+))?")

log = logging.getLogger("vaedist")


class Loaded(NamedTuple):
    """A checkpoint in memory, its tensors on the CPU."""

    state: dict[str, Any]
    step: int
    path: Path


class Best(NamedTuple):
    """The validation result that made a checkpoint the best so far."""

    metric: str
    value: float


class Damaged(Exception):
    """A checkpoint is not what its manifest says; the message is the reason."""


class Checkpoints:
    """The checkpoints of one run, in the hands of the process that holds its lock.

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
            guard: Raises if the run is no longer ours (`RunLock.check`); asked right before the rename.

        Returns:
            The checkpoint's folder.

        Raises:
            UserError: there is no room, or what `guard` raises. Older checkpoints are intact.
        """
        _assert_plain(state, "state")
        target = self._free_name(step)
        scratch = temporary(target)
        try:
            with disk_errors(f"the checkpoint of step {step}", self.folder):
                scratch.mkdir(mode=0o700)
                size, digest = _save(state, scratch / STATE)
                manifest = {
                    "format": FORMAT,
                    "step": step,
                    "files": {STATE: {"bytes": size, "sha256": digest}},
                }
                write_synced(scratch / MANIFEST, as_json(manifest))
                sync_folder(scratch)
                guard()
                os.rename(scratch, target)
                sync_folder(self.folder)
        except FileNotFoundError:
            guard()  # the sweep of whoever took the run over is the likely reason, and `guard` says it better
            raise UserError(
                f"the checkpoint of step {step} vanished from {self.folder} while it was written: does "
                "another process clean that folder? Run the same command again to continue"
            ) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return target

    def newest(self) -> Loaded | None:
        """The newest sound checkpoint, or None for a run without one.

        Sweeps what killed writes left behind; a damaged checkpoint is named, put aside and passed over.

        Raises:
            UserError: there were checkpoints, but none is sound: starting over would overwrite the run's record.
        """
        self.sweep()
        for path in reversed(_scan(self.folder)):
            try:
                return _read(path)
            except Damaged as reason:
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

    def sweep(self) -> None:
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

    def best(self) -> Path | None:
        """The folder of the best checkpoint, if one was marked and is still there."""
        return _best(self.run_folder)

    def prune(self) -> None:
        """Delete all checkpoints but the newest `keep` and the best."""
        best = self.best()
        for path in _scan(self.folder)[: -self.keep]:
            if path != best:
                # Renamed first: a half-deleted checkpoint must not look like a damaged one.
                doomed = temporary(path)
                os.rename(path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _free_name(self, step: int) -> Path:
        taken = {(number, serial) for path in _scan(self.folder) for number, serial in [_number(path)]}
        serial = next(serial for serial in range(len(taken) + 1) if (step, serial) not in taken)
        return self.folder / (f"step-{step:09d}" + (f"-{serial}" if serial else ""))


class Committer:
    """Commits in one background thread, at most one at a time, so that training does not wait for the disk.

    Errors of a commit are raised in the training thread, by the next `submit` or `join`.

    Args:
        checkpoints: Where to.
        guard: Raises if the run is no longer ours (`RunLock.check`); asked before anything visible changes.
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
        """`join`, and let the thread go."""
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


# Reading ----------------------------------------------------------------------------------------------------


def load(path: Path) -> Loaded:
    """The checkpoint in folder `path`, verified against its manifest, on the CPU.

    Raises:
        UserError: it is damaged or was written by a newer vaedist.
    """
    try:
        return _read(Path(path))
    except Damaged as reason:
        others = ", ".join(str(other) for other in _scan(Path(path).parent) if other != Path(path))
        way = f"give another: {others}" if others else "there is no other: train again"
        raise UserError(f"checkpoint {path} is damaged ({reason}); {way}") from None


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or of a run folder the best, else the newest.

    Raises:
        UserError: there is none.
    """
    given = Path(path).expanduser()
    given = given.parent if given.name == "checkpoints" and _scan(given) else given
    if (given / MANIFEST).is_file() or (given.is_dir() and _NAME.fullmatch(given.name)):
        return given
    if not given.is_dir():
        raise UserError(f"no run at {given}: give a run folder (made by vaedist-train) or a checkpoint in it")
    best = _best(given)
    if best is not None:
        return best
    found = _scan(given / "checkpoints")
    if not found:
        raise UserError(f"no checkpoint in {given}: train it first, or give another run folder")
    return found[-1]


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint folder lies in; None for one that was moved out of its run."""
    parent = checkpoint.absolute().parent
    return parent.parent if parent.name == "checkpoints" else None


def chosen_weights(state: Mapping[str, Any], weights: str | None = None) -> dict[str, Tensor]:
    """The weights of a saved state: `ema` or `raw`; default: the ones its job says everything downstream uses."""
    chosen = weights or state["job"]["train"]["weights"]
    if chosen == "raw":
        if state["model"] is None:
            raise UserError("only the averaged weights were exported: ask for these (ema)")
        return state["model"]
    if state["ema"] is None:
        raise UserError(
            "these weights were not averaged (train.ema_half_life is not set): ask for the raw ones"
        )
    return state["ema"]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 of weights by name, shape and value: 64 hex digits, the same in fp64 as in the fp32 they were cast to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        held = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        digest.update(f"{name}\0{tuple(held.shape)}\0".encode())
        digest.update(held.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Source(NamedTuple):
    """Another run, as far as a new run starts from it."""

    run: str
    """As the job names it."""
    path: str
    """Of its checkpoint, absolute."""
    step: int
    model: dict[str, Any]
    """Its job's `model` section."""
    weights: dict[str, Tensor]
    which: str
    """`ema` or `raw`."""
    sha256: str
    """Of the checkpoint's state file, from its manifest."""
    optim: dict[str, Any]
    """By phase; empty unless asked for."""


def load_source(path: Path, weights: str | None = None, *, optimizer: bool = False) -> bytes:
    """What a new run takes from another one, verified; for `source_from`, in every process.

    Args:
        path: A run or checkpoint folder.
        weights: `ema` or `raw`; default: what its job says everything downstream uses.
        optimizer: Also the state of its optimizers.
    """
    loaded = load(resolve(path))
    manifest = json.loads((loaded.path / MANIFEST).read_bytes())
    try:
        content = {
            "path": str(loaded.path.absolute()),
            "model": loaded.state["job"]["model"],
            "which": weights or loaded.state["job"]["train"]["weights"],
            "sha256": manifest["files"][STATE]["sha256"],
            "weights": chosen_weights(loaded.state, weights),
            "optim": loaded.state["optim"] if optimizer else {},
        }
    except (KeyError, TypeError):
        raise UserError(
            f"checkpoint {loaded.path} lacks what vaedist-train writes: it is of another making"
        ) from None
    return to_bytes(loaded._replace(state=content))


def source_from(data: bytes, run: str) -> Source:
    """What `load_source` packed; `run` is how the job names it."""
    found = from_bytes(data)
    assert found is not None
    return Source(run=run, step=found.step, **found.state)


def to_bytes(loaded: Loaded | None) -> bytes:
    """A loaded checkpoint (or None) as bytes, for the processes that cannot see the file."""
    buffer = io.BytesIO()
    torch.save(None if loaded is None else [loaded.state, loaded.step, str(loaded.path)], buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> Loaded | None:
    """What `to_bytes` wrote."""
    content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return None if content is None else Loaded(content[0], content[1], Path(content[2]))


def _read(path: Path) -> Loaded:
    """Verify and read; PermissionError is the reader's trouble, not the checkpoint's."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] > FORMAT:
            raise UserError(
                f"checkpoint {path} has format {manifest['format']}, this vaedist reads up to {FORMAT}: "
                "use the version that wrote it (provenance.json names it)"
            )
        said = manifest["files"][STATE]
        with (path / STATE).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != said["bytes"]:
                raise Damaged(f"{STATE} has {size} bytes, its manifest says {said['bytes']}")
            if hashlib.file_digest(file, "sha256").hexdigest() != said["sha256"]:
                raise Damaged(f"the sha256 of {STATE} is not the manifest's")
            file.seek(0)
            state = _unpack(file)
        return Loaded(state, int(manifest["step"]), path)
    except PermissionError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; ask its owner for access") from None
    except OSError as error:
        raise Damaged(f"{Path(error.filename or path).name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{MANIFEST} cannot be read: {type(error).__name__}") from None


def _unpack(file: BinaryIO) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise Damaged(f"{STATE} has compressed members, which vaedist never writes")
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise Damaged(f"{STATE} is not tensors and plain values: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict):
        raise Damaged(f"{STATE} is not a mapping")
    return state


def _scan(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_number)


def _number(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def _best(run_folder: Path) -> Path | None:
    try:
        name = json.loads((run_folder / BEST).read_bytes())["checkpoint"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s cannot be read: the newest checkpoint stands for the best", run_folder / BEST)
        return None
    if not isinstance(name, str) or not _NAME.fullmatch(name):  # a name, never a path
        return None
    path = run_folder / "checkpoints" / name
    return path if path.is_dir() else None


# Writing ----------------------------------------------------------------------------------------------------


class _Hashed:
    """A file that hashes what is written to it and keeps the first error.

    torch's archive writer reports a failed write as an obscure RuntimeError, from a destructor at worst; so it is
    told that all went well, and the true error is raised after it.
    """

    def __init__(self, file: io.FileIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                done = 0
                while done < len(view):  # an unbuffered write may be partial
                    done += self.file.write(view[done:])
                self.digest.update(view)
                self.size += len(view)
            except OSError as error:
                self.error = error
        return len(view)

    def flush(self) -> None:
        pass


def _save(state: Mapping[str, Any], path: Path) -> tuple[int, str]:
    """Size and sha256 of what was written and forced to the disk."""
    with path.open("xb", buffering=0) as raw:
        hashed = _Hashed(raw)
        torch.save(dict(state), hashed)  # type: ignore[arg-type]
        if hashed.error is not None:
            raise hashed.error
        os.fsync(raw.fileno())
    return hashed.size, hashed.digest.hexdigest()


def _assert_plain(value: Any, where: str) -> None:
    """What is saved must load again without unpickling; a numpy scalar, for one, would not."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            assert type(key) in (str, int), f"{where}: key {key!r}"
            _assert_plain(inner, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            _assert_plain(inner, f"{where}[{number}]")
    else:
        plain = isinstance(value, Tensor) or type(value) in (bool, int, float, str, bytes, type(None))
        assert plain, f"{where} is a {type(value).__name__}: neither a tensor nor a plain value"
