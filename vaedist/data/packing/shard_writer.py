"""Writing shards, so that a killed run leaves whole shards only.

Every shard is written in a workspace, flushed to disk, renamed, and then recorded by a receipt, which a later run
finds. Members have a fixed date and owner, so the same input gives the same bytes for one set of library versions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from vaedist.core.errors import UserError
from vaedist.core.files import FULL, replace_file
from vaedist.data.format.columns import SampleRow, write_columns
from vaedist.data.format.sample_codec import Codec
from vaedist.data.format.split import FACTS, Shard
from vaedist.data.packing.preparation import Prepared
from vaedist.data.packing.publish import make_read_only

Receipt = dict[str, Any]
"""`count` (0: there were no samples and nothing was written), `bytes`, `sha256`, `columns_sha256`, and notes."""


@dataclass(frozen=True)
class ShardWriter:
    """Writes the shards of one folder.

    Attributes:
        folder: Where shards end up.
        workspace: Where a shard is while it is unfinished, and its receipt; on the same filesystem.
        codec: Of the samples.
        classes: Class names in the order of their numbers.
    """

    folder: Path
    workspace: Path
    codec: Codec
    classes: Sequence[str]

    @cached_property
    def _class_numbers(self) -> dict[str | None, int]:
        return {None: -1} | {name: number for number, name in enumerate(self.classes)}

    def write(self, name: str, samples: Iterable[Prepared]) -> Receipt:
        """Write one shard and its columns under temporary names, then rename both; `name` has no suffix."""
        import webdataset  # loads torch, which worker processes and --help do without

        temporary = self.workspace / f"{name}.tar.tmp"
        rows: list[SampleRow] = []
        try:
            with open(temporary, "wb") as file:
                stream = _HashingFile(file)
                writer = webdataset.TarWriter(stream, user="vaedist", group="vaedist", mtime=0, encoder=False)
                try:
                    for sample in samples:
                        writer.write(self._members(sample))
                        # The image is the last member of its sample, padded to whole blocks of 512 bytes.
                        start = writer.tarstream.offset - -(-len(sample.member) // 512) * 512
                        rows.append(self._row(sample, start))
                    writer.close()
                except BaseException:
                    stream.discard()  # the writer holds a buffer, and would write it when it is collected
                    writer.close()
                    raise
                file.flush()
                os.fsync(file.fileno())
            if not rows:
                return {"count": 0}
            columns = self.folder / f"{name}.cols"
            columns_sha256 = write_columns(columns, temporary, rows)
            make_read_only(columns)
            make_read_only(temporary)
            os.replace(temporary, self.folder / f"{name}.tar")
        finally:
            temporary.unlink(missing_ok=True)
        return dict(
            zip(FACTS, (len(rows), stream.count, stream.sha256.hexdigest(), columns_sha256), strict=True)
        )

    def shard(self, name: str, receipt: Receipt) -> Shard:
        """The shard that was written, for the index."""
        return Shard.of(self.folder / f"{name}.tar", self.folder / f"{name}.cols", receipt)

    def record(self, name: str, receipt: Receipt) -> None:
        """Keep the receipt for a later run."""
        replace_file(self.workspace / f"{name}.json", json.dumps(receipt).encode())

    def receipt(self, name: str) -> Receipt | None:
        """The receipt of a shard that an earlier run finished; None: it has to be written."""
        with suppress(FileNotFoundError, ValueError, KeyError):
            receipt: Receipt = json.loads((self.workspace / f"{name}.json").read_bytes())
            tar, columns = self.folder / f"{name}.tar", self.folder / f"{name}.cols"
            if not receipt["count"] or (tar.stat().st_size == receipt["bytes"] and columns.is_file()):
                return receipt
        return None

    def remove_temporary_files(self) -> None:
        """Remove what a killed run left half written."""
        for left in self.workspace.glob("*.tmp"):
            left.unlink()

    def _members(self, sample: Prepared) -> dict[str, str | bytes]:
        """The sample as `webdataset.TarWriter` takes it."""
        item = sample.item
        fields = {"origin": item.origin, "class": item.label, "subject": item.subject or None}
        note = {key: value for key, value in fields.items() if value is not None}
        members: dict[str, str | bytes] = {"__key__": item.key, self.codec: sample.member}
        members["json"] = json.dumps(note, sort_keys=True).encode()
        if item.label is not None:
            members["cls"] = str(self._class_numbers[item.label]).encode()
        return members

    def _row(self, sample: Prepared, start: int) -> SampleRow:
        item = sample.item
        label = self._class_numbers[item.label]
        size = len(sample.member) - sample.skip
        return SampleRow(item.key, start + sample.skip, size, sample.crc, label, item.subject, sample.digest)


class _HashingFile:
    """A file that is only written to, with the SHA-256 of what went in."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file: IO[bytes] | None = file
        self.sha256 = hashlib.sha256()
        self.count = 0

    def discard(self) -> None:
        """Accept what is still written, and write it nowhere."""
        self._file = None

    def write(self, data: bytes) -> int:
        if self._file is None:
            return len(data)
        self.sha256.update(data)
        self.count += len(data)
        return self._file.write(data)


@contextmanager
def explain_write_errors(out: Path) -> Iterator[None]:
    """Turn a full disk, a quota, or a folder that cannot be written into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(
                f"no space left for {out} ({error.strerror}); whole shards are kept: make room, and the same "
                "command continues"
            ) from None
        place, reason = error.filename or out, error.strerror or error
        raise UserError(f"cannot use {place}: {reason}; give another folder with --out") from None
