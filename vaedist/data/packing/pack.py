"""Packing: a source becomes plain WebDataset tars with an index beside them.

    DIR/index.json                      written last: without it the folder is unfinished
    DIR/<split>-000000.tar, .cols       samples, and what is known of each
    DIR/contact-<split>.png             64 samples for a person to look at
    DIR/rejected.jsonl                  what was left out and why, if anything was (`--skip-bad`)
    DIR/.packing/                       while it is being made: the plan, receipts, the shard being written

A sample is `<key>.png` or `<key>.npy`, `<key>.cls` (its class number, where there are classes) and
`<key>.json` (class name, subject, origin). Members have a fixed date and owner, so the same input gives the same
bytes for one set of library versions.

Every shard is written under `.packing/`, flushed to disk, renamed, then entered by a receipt. A run that was
killed, or met a full disk, leaves whole shards only; the same command makes the same plan, keeps the shards
that have receipts, and ends with the bytes an undisturbed run would have written.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import vaedist
from vaedist.core.errors import UserError
from vaedist.core.files import FULL, replace_file
from vaedist.data.format.columns import write_columns
from vaedist.data.format.image_files import Codec, Fit
from vaedist.data.format.index import INDEX_NAME, Index, Shard
from vaedist.data.packing import packing_plan as planning
from vaedist.data.packing.packing_plan import Bad, Order, Part, Plan
from vaedist.data.packing.preparation import (
    Prepared,
    Preparer,
    Rejected,
    barred,
    choose_shape,
    prepare_in_order,
)
from vaedist.data.packing.publish import publish, read_only, twins
from vaedist.data.sources import Settings, Source, detect, find

WORKSPACE = ".packing"
REJECTED = "rejected.jsonl"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Packing:
    """What to pack, and how: the options of `vaedist-shard INPUT --out DIR`.

    Attributes:
        input: A folder, or the word `phantom`.
        source: Name of a source; None: found by the layout.
        channels: 1 or 3; None: 3 if any of the first images is in colour, else 1.
        per_shard: Samples per shard; None: as many as keep a shard within 64 MB.
        subjects: A subject map file.
        validation, test: Shares to hold apart where the source has no such split.
    """

    input: str
    out: Path
    source: str | None = None
    size: int | None = None
    fit: Fit | None = None
    channels: int | None = None
    codec: Codec = "png"
    per_shard: int | None = None
    order: Order = "random"
    seed: int = 0
    subjects: Path | None = None
    validation: float | None = None
    test: float | None = None
    skip_bad: bool = False
    workers: int = 1
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Report:
    """What was packed."""

    index: Index
    rejected: int
    twins: int
    """Images of other splits whose pixels equal an image of `train`."""
    already: bool = False
    """Whether the folder was finished before."""
    bars: tuple[int, int] = (0, 0)
    """On how many images, of how many looked at, padding shows that nobody has asked for."""


def pack(options: Packing, progress: Progress | None = None) -> Report:
    """Pack a source into a folder; continues where a killed run was.

    Args:
        options: What and how.
        progress: Called with (samples done, samples in all).

    Raises:
        UserError: bad input (unless `skip_bad`), a folder that holds something else, or a full disk.
    """
    _refuse(options)
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        workspace = options.out / WORKSPACE
        finished = (options.out / INDEX_NAME).exists()
        strangers = [one.name for one in options.out.iterdir() if not one.name.startswith(".")]
        if strangers and not finished and not workspace.is_dir():
            raise UserError(f"{options.out} is not empty ({strangers[0]}): give a new folder with --out")
        workspace.mkdir(mode=0o700, exist_ok=True)
        with _only_one(workspace):
            try:
                return _pack(options, workspace, finished, progress)
            finally:
                # Finished, or nothing worth going on from: an empty folder is not left behind either.
                if (options.out / INDEX_NAME).exists() or set(os.listdir(workspace)) <= {"lock", "plan.json"}:
                    shutil.rmtree(workspace, ignore_errors=True)
                    with suppress(OSError):
                        options.out.rmdir()


def _pack(options: Packing, workspace: Path, finished: bool, progress: Progress | None) -> Report:
    # What there is.
    name = options.source or ("phantom" if options.input == "phantom" else detect(Path(options.input)))
    source = _open(name, options, workspace)
    bad = Bad(options.skip_bad)
    items = planning.usable(source.items(), bad)
    if not items:
        wrong = (
            "no path in it fits --match"
            if options.settings.match
            else "give another folder, or another --source"
        )
        raise UserError(f"{options.input} holds no image that can be packed (source {name}): {wrong}")
    if options.subjects is not None:
        items = planning.map_subjects(items, planning.read_subject_map(options.subjects), options.subjects)
    items = planning.part_subjects(items, bad)
    items = planning.choose_splits(items, options.validation, options.test, options.seed)

    # What becomes of it.
    shape, convert = choose_shape(source, items, options.size, options.channels, options.skip_bad)
    per_shard = options.per_shard or planning.samples_per_shard(shape[0] * shape[1] * shape[2])
    told = _told(name, options, shape, per_shard)
    plan = planning.make_plan(
        items, per_shard=per_shard, order=options.order, seed=options.seed, settings=told
    )
    if finished:
        return _already(options.out, plan)
    _claim(workspace, plan, options.out)
    preparer = Preparer(source, options.size, options.fit or "pad", convert, shape, options.codec)
    receipts = _write_parts(plan, preparer, options, workspace, progress)

    # The index, last.
    splits: dict[str, list[Shard]] = {}
    for part in plan.parts:
        receipt = receipts[part.name]
        for rejected in receipt["rejected"]:
            bad.add(**rejected)
        if receipt["count"]:
            splits.setdefault(part.split, []).append(shard_of(options.out, part.name, receipt))
    if not splits:
        raise UserError(f"no image of {options.input} could be packed: the first {bad.problems[0].reason}")
    if bad.problems:
        lines = [json.dumps({"file": one.origin, "reason": one.reason}) for one in bad.problems]
        replace_file(options.out / REJECTED, "".join(f"{line}\n" for line in lines).encode())
        read_only(options.out / REJECTED)
    source_note = {**told, "plan": plan.digest, "rejected": len(bad.problems), "versions": _versions()}
    index = publish(
        options.out, splits, shape=shape, codec=options.codec, classes=plan.classes, source=source_note
    )
    unasked = options.size is not None and options.fit is None and "fit" in find(name).OPTIONS
    bars = barred(source, items) if unasked else (0, 0)
    return Report(index, len(bad.problems), twins(index), bars=bars)


def _refuse(options: Packing) -> None:
    """Refuse what is wrong whatever the source holds, before a folder is made."""
    out, given = options.out.absolute(), Path(options.input).absolute()
    if options.input != "phantom" and given.is_dir() and given in out.parents:
        raise UserError(
            f"--out {options.out} lies in {options.input}, which is packed: give a folder beside it"
        )
    largest = options.settings.limits.pixels
    if options.size is not None and options.size**2 > largest:
        raise UserError(
            f"--size {options.size} makes images of {options.size**2:,} pixels, more than {largest:,}: give a smaller "
            "one, or allow more with --max-pixels"
        )


# Before writing ----------------------------------------------------------------------------------------------


def _open(name: str, options: Packing, workspace: Path) -> Source:
    """The source, after a check that every setting given means something to it."""
    module = find(name)
    given = {key: getattr(options.settings, key) for key in ("count", "match", "slices", "axis")}
    given["fit"] = options.fit
    for key, value in given.items():
        if value is not None and key not in module.OPTIONS:
            raise UserError(f"--{key} has no meaning for the source {name!r}: leave it away")
    if options.fit is not None and options.size is None:
        raise UserError(f"--fit {options.fit} needs --size: without a size pictures are kept as they are")
    settings = replace(options.settings, seed=options.seed, size=options.size, workspace=workspace)
    opened: Source = module.open_source(Path(options.input), settings)
    return opened


def _told(name: str, options: Packing, shape: tuple[int, ...], per_shard: int) -> dict[str, Any]:
    """The settings that decide the bytes, for the plan and for `index.json`; no path of this machine."""
    chosen = options.settings
    told = {
        "source": name,
        "input": Path(options.input).name,
        "shape": list(shape),
        "size": options.size,
        "fit": (options.fit or "pad") if options.size is not None else None,
        "codec": options.codec,
        "samples_per_shard": per_shard,
        "order": options.order,
        "seed": options.seed,
        "subjects": options.subjects.name if options.subjects else None,
        "validation_fraction": options.validation,
        "test_fraction": options.test,
        "count": dict(chosen.count) if chosen.count else None,
        "match": chosen.match,
        "slices": list(chosen.slices) if chosen.slices else None,
        "axis": chosen.axis,
    }
    return {key: value for key, value in told.items() if value is not None}


def _versions() -> dict[str, str]:
    """What the bytes of a tar depend on besides the plan."""
    libraries = {name: importlib.metadata.version(name) for name in ("numpy", "pillow", "webdataset")}
    return {"vaedist": vaedist.__version__, **libraries}


def _already(out: Path, plan: Plan) -> Report:
    index = Index.open(out)
    if index.source.get("plan") != plan.digest:
        raise UserError(
            f"{out} already holds a packed set made of other input or with other settings: give another --out, "
            "or remove that folder"
        )
    return Report(index, int(index.source.get("rejected", 0)), twins(index), already=True)


def _claim(workspace: Path, plan: Plan, out: Path) -> None:
    """Enter the plan, or check that the run to be continued had the same one; sweep what it left half done."""
    claim = {"plan": plan.digest, "versions": _versions()}
    path = workspace / "plan.json"
    # Who corrects a command that failed before its first shard should not have to clear up after it.
    begun = any(out.glob("*.tar")) or len(list(workspace.glob("*.json"))) > 1
    if begun and path.exists() and json.loads(path.read_bytes()) != claim:
        raise UserError(
            f"{out} was begun with other input, settings or library versions: remove it, or give another --out"
        )
    for left in workspace.glob("*.tmp"):
        left.unlink()
    replace_file(path, json.dumps(claim).encode())


# Writing -----------------------------------------------------------------------------------------------------


def _write_parts(
    plan: Plan, preparer: Preparer, options: Packing, workspace: Path, progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """Write the shards that are missing; the receipts of all, by name."""
    receipts = {part.name: _receipt(part, workspace, options) for part in plan.parts}
    missing = [part for part in plan.parts if receipts[part.name] is None]
    total = sum(len(part.items) for part in plan.parts)
    done = total - sum(len(part.items) for part in missing)
    samples = prepare_in_order(preparer, (item for part in missing for item in part.items), options.workers)
    bad = Bad(options.skip_bad)
    numbers = {name: number for number, name in enumerate(plan.classes)}

    def counted(part: Part) -> Iterator[Prepared]:
        nonlocal done
        for sample in islice(samples, len(part.items)):
            done += 1
            if progress:
                progress(done, total)
            if isinstance(sample, Rejected):
                bad.add(sample.item.origin, sample.reason)
            else:
                yield sample

    for part in missing:
        bad.problems.clear()
        receipt = write_shard(part.name, counted(part), numbers, options.codec, options.out, workspace)
        receipt["limits"] = list(astuple(options.settings.limits))
        receipt["rejected"] = [{"origin": one.origin, "reason": one.reason} for one in bad.problems]
        replace_file(workspace / f"{part.name}.json", json.dumps(receipt).encode())
        receipts[part.name] = receipt
    return {name: receipt for name, receipt in receipts.items() if receipt is not None}


def _receipt(part: Part, workspace: Path, options: Packing) -> dict[str, Any] | None:
    """What an earlier run, under the same limits, noted of a shard that it finished; None: it is to be written."""
    try:
        receipt: dict[str, Any] = json.loads((workspace / f"{part.name}.json").read_bytes())
        whole = receipt["limits"] == list(astuple(options.settings.limits))
        if receipt["count"]:
            whole = whole and (options.out / f"{part.name}.tar").stat().st_size == receipt["bytes"]
            whole = whole and (options.out / f"{part.name}.cols").is_file()
        return receipt if whole else None
    except (FileNotFoundError, ValueError):
        return None


def write_shard(
    name: str,
    samples: Iterable[Prepared],
    numbers: Mapping[str, int],
    codec: Codec,
    out: Path,
    workspace: Path,
) -> dict[str, Any]:
    """Write one shard and its columns under temporary names, then rename both.

    Args:
        name: Without suffix.
        samples: In order.
        numbers: Class name to class number.
        codec: What the samples' members are.
        out: Where the shard ends up.
        workspace: Where it is while it is unfinished; on the same filesystem.

    Returns:
        Its receipt, for `shard_of`: `count` (0: there were no samples and nothing was written), `bytes`, `sha256`,
        `columns_sha256`.
    """
    import webdataset  # loads torch, which worker processes and --help do without

    temporary = workspace / f"{name}.tar.tmp"
    rows: list[_Row] = []
    try:
        with open(temporary, "wb") as file:
            stream = _Hashed(file)
            writer = webdataset.TarWriter(stream, user="vaedist", group="vaedist", mtime=0, encoder=False)
            try:
                for sample in samples:
                    writer.write(_members(sample, numbers, codec))
                    # The image is the last member of its sample, padded to whole blocks of 512 bytes.
                    start = writer.tarstream.offset - -(-len(sample.member) // 512) * 512
                    rows.append(_Row(sample, start + sample.skip, len(sample.member) - sample.skip))
                writer.close()
            except BaseException:
                stream.discard()  # the writer holds a buffer, and would write it when it is collected
                writer.close()
                raise
            file.flush()
            os.fsync(file.fileno())
        if not rows:
            return {"count": 0}
        columns = out / f"{name}.cols"
        columns_sha256 = write_columns(
            columns,
            tar=temporary,
            keys=[row.item.key for row in rows],
            offsets=[row.offset for row in rows],
            sizes=[row.size for row in rows],
            crcs=[row.crc for row in rows],
            labels=[-1 if row.item.label is None else numbers[row.item.label] for row in rows],
            subjects=[row.item.subject for row in rows],
            pixels=[row.digest for row in rows],
        )
        read_only(columns)
        read_only(temporary)
        os.replace(temporary, out / f"{name}.tar")
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "count": len(rows),
        "bytes": stream.count,
        "sha256": stream.sha256.hexdigest(),
        "columns_sha256": columns_sha256,
    }


class _Row:
    """What is kept of a sample once its bytes are written."""

    def __init__(self, sample: Prepared, offset: int, size: int) -> None:
        self.item, self.crc, self.digest = sample.item, sample.crc, sample.digest
        self.offset, self.size = offset, size


class _Hashed:
    """A file that is only written to, with the SHA-256 of what went in."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file: IO[bytes] | None = file
        self.sha256 = hashlib.sha256()
        self.count = 0

    def discard(self) -> None:
        """Take what is still written, and write it nowhere."""
        self._file = None

    def write(self, data: bytes) -> int:
        if self._file is None:
            return len(data)
        self.sha256.update(data)
        self.count += len(data)
        return self._file.write(data)


def _members(sample: Prepared, numbers: Mapping[str, int], codec: Codec) -> dict[str, str | bytes]:
    """The sample as `webdataset.TarWriter` takes it."""
    item = sample.item
    told = {"origin": item.origin, "class": item.label, "subject": item.subject or None}
    note = json.dumps({key: value for key, value in told.items() if value is not None}, sort_keys=True)
    members: dict[str, str | bytes] = {"__key__": item.key, codec: sample.member, "json": note.encode()}
    if item.label is not None:
        members["cls"] = str(numbers[item.label]).encode()
    return members


def shard_of(out: Path, name: str, receipt: Mapping[str, Any]) -> Shard:
    """The shard that `write_shard` wrote, for the index."""
    return Shard(
        out / f"{name}.tar",
        out / f"{name}.cols",
        receipt["count"],
        receipt["bytes"],
        receipt["sha256"],
        receipt["columns_sha256"],
    )


# Around it ---------------------------------------------------------------------------------------------------


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Tell a full disk, a quota, or a folder that may not be written in one sentence."""
    try:
        yield
    except OSError as error:
        place = error.filename or out
        if error.errno in FULL:
            raise UserError(
                f"no space left for {out} ({error.strerror}); whole shards are kept: make room, and the same "
                "command continues"
            ) from None
        raise UserError(
            f"cannot use {place}: {error.strerror or error}; give another folder with --out"
        ) from None


@contextmanager
def _only_one(workspace: Path) -> Iterator[None]:
    """Hold the folder for this process; the kernel lets go when it ends, however it ends."""
    with open(workspace / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another vaedist-shard is writing to {workspace.parent}: wait for it") from None
        yield
