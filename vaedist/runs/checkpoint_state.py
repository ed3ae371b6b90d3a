"""A checkpoint's `state.pt`: tensors and plain values, written with their sha256, read without running any code.

`torch.load(weights_only=True)` reads an archive whose members are stored uncompressed: a foreign file can neither act
nor unfold to more than its own size.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

STATE = "state.pt"


class DamagedCheckpoint(Exception):
    """A checkpoint is not what its manifest says; the message is the reason."""


def save_state(state: Mapping[str, Any], path: Path) -> tuple[int, str]:
    """Write `state` and force it to the disk; its size in bytes and its sha256."""
    with path.open("xb", buffering=0) as raw:
        written = _Sha256File(raw)
        torch.save(dict(state), written)  # type: ignore[arg-type]
        if written.error is not None:
            raise written.error
        os.fsync(raw.fileno())
    return written.size, written.digest.hexdigest()


def read_state(file: BinaryIO) -> dict[str, Any]:
    """The state in an open file, on the CPU.

    Raises:
        DamagedCheckpoint: it is not what `save_state` writes.
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
    always succeeds, and `save_state` raises the true error afterwards.
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
