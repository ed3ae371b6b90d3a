"""The format of one checkpoint folder: `state.pt`, and a manifest with the size and sha256 of every file.

Reading verifies the files against `manifest.json` first.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vaedist.core.errors import UserError
from vaedist.core.files import as_json, sync_folder, write_synced
from vaedist.runs.checkpoint_state import STATE, DamagedCheckpoint, read_state, save_state

FORMAT = 1
MANIFEST = "manifest.json"


class LoadedCheckpoint(NamedTuple):
    """A checkpoint in memory, its tensors on the CPU."""

    state: dict[str, Any]
    step: int
    path: Path


def write_checkpoint(folder: Path, state: Mapping[str, Any], step: int) -> None:
    """Write `state` and its manifest into an empty folder, and force both to the disk."""
    size, digest = save_state(state, folder / STATE)
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
            state = read_state(file)
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
