"""The format of one checkpoint folder: `state.pt` (tensors and plain values), and a manifest with its size and sha256.

Reading verifies `state.pt` against the manifest first. It runs no code: `torch.load(weights_only=True)` on an archive
whose members are stored uncompressed, so that a foreign file can neither act nor unfold to more than its own size.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from vaedist.core.errors import UserError
from vaedist.core.files import as_json, sync_folder, write_synced

FORMAT = 1
STATE = "state.pt"
MANIFEST = "manifest.json"


class DamagedCheckpoint(Exception):
    """A checkpoint is not what its manifest says; the message is the reason."""


class LoadedCheckpoint(NamedTuple):
    """A checkpoint in memory, its tensors on the CPU."""

    state: dict[str, Any]
    step: int
    path: Path


def write_checkpoint(folder: Path, state: Mapping[str, Any], step: int) -> None:
    """Write `state` and its manifest into an empty folder, and force both to the disk."""
    size, digest = _save_state(state, folder / STATE)
    manifest = {"format": FORMAT, "step": step, "files": {STATE: {"bytes": size, "sha256": digest}}}
    write_synced(folder / MANIFEST, as_json(manifest))
    sync_folder(folder)


def read_checkpoint(path: Path) -> LoadedCheckpoint:
    """The checkpoint in folder `path`, verified against its manifest.

    Raises:
        DamagedCheckpoint: it is not what its manifest says.
        UserError: it may not be read, or a newer vaedist wrote it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] > FORMAT:
            raise UserError(
                f"checkpoint {path} has format {manifest['format']}, this vaedist reads up to {FORMAT}: "
                "use the version that wrote it (provenance.json names it)"
            )
        expected = manifest["files"][STATE]
        with (path / STATE).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected["bytes"]:
                raise DamagedCheckpoint(f"{STATE} has {size} bytes, its manifest says {expected['bytes']}")
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise DamagedCheckpoint(f"the sha256 of {STATE} is not the manifest's")
            file.seek(0)
            state = _read_state(file)
        return LoadedCheckpoint(state, int(manifest["step"]), path)
    except PermissionError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; ask its owner for access") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{Path(error.filename or path).name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} cannot be read: {type(error).__name__}") from None


def state_sha256(checkpoint: Path) -> str:
    """The sha256 of a checkpoint's state file, from its manifest."""
    digest: str = json.loads((checkpoint / MANIFEST).read_bytes())["files"][STATE]["sha256"]
    return digest


def checkpoint_to_bytes(loaded: LoadedCheckpoint | None) -> bytes:
    """A loaded checkpoint (or None) as bytes, for processes that cannot see the file."""
    buffer = io.BytesIO()
    torch.save(None if loaded is None else [loaded.state, loaded.step, str(loaded.path)], buffer)
    return buffer.getvalue()


def checkpoint_from_bytes(data: bytes) -> LoadedCheckpoint | None:
    """The checkpoint that `checkpoint_to_bytes` wrote."""
    content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return None if content is None else LoadedCheckpoint(content[0], content[1], Path(content[2]))


def _save_state(state: Mapping[str, Any], path: Path) -> tuple[int, str]:
    """Write `state` and force it to the disk; its size in bytes and its sha256."""
    with path.open("xb", buffering=0) as raw:
        written = _Sha256File(raw)
        torch.save(dict(state), written)  # type: ignore[arg-type]
        if written.error is not None:
            raise written.error
        os.fsync(raw.fileno())
    return written.size, written.digest.hexdigest()


def _read_state(file: BinaryIO) -> dict[str, Any]:
    """The state in an open file, on the CPU.

    Raises:
        DamagedCheckpoint: it is not what `_save_state` writes.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise DamagedCheckpoint(f"{STATE} has compressed members, which vaedist never writes")
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DamagedCheckpoint(
            f"{STATE} is not tensors and plain values: {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{STATE} is not a mapping")
    return state


def assert_plain(value: Any, where: str) -> None:
    """What is saved must load again without unpickling, which a numpy scalar, for example, would not."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            assert type(key) in (str, int), f"{where}: key {key!r}"
            assert_plain(inner, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            assert_plain(inner, f"{where}[{number}]")
    else:
        plain = isinstance(value, Tensor) or type(value) in (bool, int, float, str, bytes, type(None))
        assert plain, f"{where} is a {type(value).__name__}: neither a tensor nor a plain value"


class _Sha256File:
    """A file that hashes what is written to it and keeps the first error.

    torch's archive writer turns a failed write into an obscure RuntimeError, at worst from a destructor. So `write`
    always succeeds, and `_save_state` raises the true error afterwards.
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
