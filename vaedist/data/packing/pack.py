"""Packing: a source becomes plain WebDataset tars with an index beside them.

    DIR/index.json                      written last: without it the folder is unfinished
    DIR/<split>-000000.tar, .cols       samples, and what is known of each
    DIR/contact-<split>.png             64 samples for a person to look at
    DIR/rejected.jsonl                  what was left out and why, if anything was (`--skip-bad`)
    DIR/.packing/                       while it is being made: the plan, receipts, the shard being written

A sample is `<key>.png` or `<key>.npy`, `<key>.cls` (its class number, where there are classes) and
`<key>.json` (class name, subject, origin). Members have a fixed date and owner, so the same input gives the same
bytes for one set of library versions.

A run that was killed, or met a full disk, leaves whole shards only (`vaedist.data.packing.shard_writer`); the same
command makes the same plan, keeps the shards that have receipts, and ends with the bytes that one run without
interruption would have written.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import vaedist
from vaedist.core.errors import UserError
from vaedist.core.files import replace_file
from vaedist.data.format.index import INDEX_NAME, DatasetInfo, Index
from vaedist.data.format.resize import Fit
from vaedist.data.format.sample_codec import Codec
from vaedist.data.format.split import Shard
from vaedist.data.packing import packing_plan, preparation
from vaedist.data.packing.duplicates import count_duplicates
from vaedist.data.packing.packing_plan import PackingOrder, PackingPlan, PlannedShard
from vaedist.data.packing.preparation import Prepared, Preparer, Rejected
from vaedist.data.packing.publish import make_read_only, publish
from vaedist.data.packing.rejections import REJECTED, Rejections
from vaedist.data.packing.shard_writer import Receipt, ShardWriter, explain_write_errors
from vaedist.data.packing.subjects import keep_subjects_in_one_split, map_subjects, read_subject_map
from vaedist.data.sources import ImageSource, SourceSettings, detect, find

WORKSPACE = ".packing"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackingConfig:
    """What to pack, and how: the options of `vaedist-shard INPUT --out DIR`.

    Attributes:
        input: A folder, or the word `phantom`.
        source: Name of a source; None: found by the layout.
        channels: 1 or 3; None: 3 if any of the first images is in color, else 1.
        samples_per_shard: Samples per shard; None: as many as keep a shard within 64 MB.
        subjects: A subject map file.
        validation_fraction, test_fraction: Shares to hold out where the source has no such split.
    """

    input: str
    out: Path
    source: str | None = None
    size: int | None = None
    fit: Fit | None = None
    channels: int | None = None
    codec: Codec = "png"
    samples_per_shard: int | None = None
    order: PackingOrder = "random"
    seed: int = 0
    subjects: Path | None = None
    validation_fraction: float | None = None
    test_fraction: float | None = None
    skip_bad: bool = False
    workers: int = 1
    settings: SourceSettings = field(default_factory=SourceSettings)


@dataclass(frozen=True)
class PackingReport:
    """What was packed."""

    index: Index
    rejected: int
    duplicates: int
    """Images of other splits whose pixels equal an image of `train`."""
    already: bool = False
    """Whether the folder was finished before."""
    letterboxed: tuple[int, int] = (0, 0)
    """How many images, of how many looked at, get visible black borders from a padding that was not asked for."""


def pack(config: PackingConfig, progress: Progress | None = None) -> PackingReport:
    """Pack a source into a folder; continues where a killed run was.

    Args:
        config: What and how.
        progress: Called with (samples done, samples in all).

    Raises:
        UserError: bad input (unless `skip_bad`), a folder that holds something else, or a full disk.
    """
    _check_config(config)
    out = config.out
    with explain_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        workspace = out / WORKSPACE
        finished = (out / INDEX_NAME).exists()
        foreign = [path.name for path in out.iterdir() if not path.name.startswith(".")]
        if foreign and not finished and not workspace.is_dir():
            raise UserError(f"{out} is not empty ({foreign[0]}): give a new folder with --out")
        workspace.mkdir(mode=0o700, exist_ok=True)
        with _only_one(workspace):
            try:
                return _pack(config, workspace, finished, progress)
            finally:
                # Finished, or there is nothing to continue from: an empty folder is not left behind either.
                if (out / INDEX_NAME).exists() or set(os.listdir(workspace)) <= {"lock", "plan.json"}:
                    shutil.rmtree(workspace, ignore_errors=True)
                    with suppress(OSError):
                        out.rmdir()


def _pack(config: PackingConfig, workspace: Path, finished: bool, progress: Progress | None) -> PackingReport:
    # What is packed.
    name = config.source or ("phantom" if config.input == "phantom" else detect(Path(config.input)))
    source = _open(name, config, workspace)
    rejections = Rejections(config.skip_bad)
    items = packing_plan.usable_items(source.items(), rejections)
    if not items:
        match = config.settings.match
        advice = "no path in it fits --match" if match else "give another folder, or another --source"
        raise UserError(f"{config.input} holds no image that can be packed (source {name}): {advice}")
    if config.subjects is not None:
        items = map_subjects(items, read_subject_map(config.subjects), config.subjects)
    items = keep_subjects_in_one_split(items, rejections)
    items = packing_plan.choose_splits(items, config.validation_fraction, config.test_fraction, config.seed)

    # How it is packed.
    shape = preparation.choose_shape(source, items, config.size, config.channels, config.skip_bad)
    per_shard = config.samples_per_shard or packing_plan.samples_per_shard(shape[0] * shape[1] * shape[2])
    settings = _recorded_settings(name, config, shape, per_shard)
    plan = packing_plan.make_plan(
        items, per_shard=per_shard, order=config.order, seed=config.seed, settings=settings
    )
    if finished:
        return _report_finished(config.out, plan)
    gray = config.channels == 1
    preparer = Preparer(source, config.size, config.fit or "pad", gray, shape, config.codec)
    writer = ShardWriter(config.out, workspace, config.codec, plan.classes)
    _claim(writer, plan)
    receipts = _write_shards(plan, preparer, writer, config, progress)

    # The index, last.
    splits: dict[str, list[Shard]] = {}
    for planned in plan.shards:
        receipt = receipts[planned.name]
        for rejected in receipt["rejected"]:
            rejections.add(**rejected)
        if receipt["count"]:
            splits.setdefault(planned.split, []).append(writer.shard(planned.name, receipt))
    problems = rejections.problems
    if not splits:
        raise UserError(f"no image of {config.input} could be packed: the first {problems[0].reason}")
    if problems:
        rejections.write(config.out)
        make_read_only(config.out / REJECTED)
    note = {**settings, "plan": plan.digest, "rejected": len(problems), "versions": _versions()}
    index = publish(config.out, splits, DatasetInfo(shape, config.codec, plan.classes, note))
    default_fit = config.size is not None and config.fit is None and "fit" in find(name).OPTIONS
    letterboxed = preparation.count_letterboxed(source, items) if default_fit else (0, 0)
    return PackingReport(index, len(problems), count_duplicates(index), letterboxed=letterboxed)


def _check_config(config: PackingConfig) -> None:
    """Refuse, before a folder is made, what is wrong whatever the source holds."""
    out, given = config.out.absolute(), Path(config.input).absolute()
    if config.input != "phantom" and given.is_dir() and given in out.parents:
        where = f"{config.input}, which is packed"
        raise UserError(f"--out {config.out} lies in {where}: give a folder beside it")
    largest = config.settings.limits.pixels
    if config.size is not None and config.size**2 > largest:
        raise UserError(
            f"--size {config.size} makes images of {config.size**2:,} pixels, more than {largest:,}: give a smaller "
            "one, or allow more with --max-pixels"
        )


# Before writing ----------------------------------------------------------------------------------------------


def _open(name: str, config: PackingConfig, workspace: Path) -> ImageSource:
    """The source, after a check that every setting given means something to it."""
    module = find(name)
    given = {key: getattr(config.settings, key) for key in ("count", "match", "slices", "axis")}
    given["fit"] = config.fit
    for key, value in given.items():
        if value is not None and key not in module.OPTIONS:
            raise UserError(f"--{key} has no meaning for the source {name!r}: leave it away")
    if config.fit is not None and config.size is None:
        raise UserError(f"--fit {config.fit} needs --size: without a size pictures are kept as they are")
    settings = replace(config.settings, seed=config.seed, size=config.size, workspace=workspace)
    opened: ImageSource = module.open_source(Path(config.input), settings)
    return opened


_RECORDED = (
    "source input shape size fit codec samples_per_shard order seed subjects validation_fraction test_fraction "
    "count match slices axis"
).split()


def _recorded_settings(
    name: str, config: PackingConfig, shape: tuple[int, ...], per_shard: int
) -> dict[str, Any]:
    """The settings that decide the bytes, for the plan and for `index.json`; no path of this machine."""
    settings = vars(config.settings) | vars(config)
    settings |= {"source": name, "shape": shape, "samples_per_shard": per_shard}
    settings["input"] = Path(config.input).name
    settings["fit"] = (config.fit or "pad") if config.size is not None else None
    settings["subjects"] = config.subjects.name if config.subjects else None
    settings["count"] = dict(config.settings.count or {}) or None
    return {key: settings[key] for key in _RECORDED if settings[key] is not None}


def _versions() -> dict[str, str]:
    """What the bytes of a tar depend on besides the plan."""
    libraries = {name: importlib.metadata.version(name) for name in ("numpy", "pillow", "webdataset")}
    return {"vaedist": vaedist.__version__, **libraries}


def _report_finished(out: Path, plan: PackingPlan) -> PackingReport:
    index = Index.open(out)
    if index.source.get("plan") != plan.digest:
        raise UserError(
            f"{out} already holds a packed set made of other input or with other settings: give another --out, "
            "or remove that folder"
        )
    return PackingReport(index, int(index.source.get("rejected", 0)), count_duplicates(index), already=True)


def _claim(writer: ShardWriter, plan: PackingPlan) -> None:
    """Record the plan, or check that the run to be continued had the same one; remove its temporary files."""
    claim = {"plan": plan.digest, "versions": _versions()}
    path = writer.workspace / "plan.json"
    # A command that failed before its first shard can be corrected without removing the folder first.
    begun = any(writer.folder.glob("*.tar")) or len(list(writer.workspace.glob("*.json"))) > 1
    if begun and path.exists() and json.loads(path.read_bytes()) != claim:
        raise UserError(
            f"{writer.folder} was begun with other input, settings or library versions: remove it, or give another "
            "--out"
        )
    writer.remove_temporary_files()
    replace_file(path, json.dumps(claim).encode())


# Writing -----------------------------------------------------------------------------------------------------


def _write_shards(
    plan: PackingPlan,
    preparer: Preparer,
    writer: ShardWriter,
    config: PackingConfig,
    progress: Progress | None,
) -> dict[str, Receipt]:
    """Write the shards that are missing; the receipts of all, by name."""
    limits = list(astuple(config.settings.limits))
    receipts: dict[str, Receipt] = {}
    for planned in plan.shards:
        earlier = writer.receipt(planned.name)
        if earlier is not None and earlier["limits"] == limits:
            receipts[planned.name] = earlier
    missing = [planned for planned in plan.shards if planned.name not in receipts]
    total = sum(len(planned.items) for planned in plan.shards)
    done = total - sum(len(planned.items) for planned in missing)
    items = (item for planned in missing for item in planned.items)
    samples = preparation.prepare_in_order(preparer, items, config.workers)
    rejections = Rejections(config.skip_bad)

    def usable(planned: PlannedShard) -> Iterator[Prepared]:
        nonlocal done
        for sample in islice(samples, len(planned.items)):
            done += 1
            if progress:
                progress(done, total)
            if isinstance(sample, Rejected):
                rejections.add(sample.item.origin, sample.reason)
            else:
                yield sample

    for planned in missing:
        rejections.problems.clear()
        receipt = writer.write(planned.name, usable(planned))
        receipt |= {"limits": limits, "rejected": [asdict(problem) for problem in rejections.problems]}
        writer.record(planned.name, receipt)
        receipts[planned.name] = receipt
    return receipts


@contextmanager
def _only_one(workspace: Path) -> Iterator[None]:
    """Lock the folder for this process; the kernel unlocks it when the process ends, however it ends."""
    with open(workspace / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another vaedist-shard is writing to {workspace.parent}: wait for it") from None
        yield
