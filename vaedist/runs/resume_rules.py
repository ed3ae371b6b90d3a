"""What a resumed run may change: the job asked for now is compared with the job in the checkpoint, key by key.

Each setting's resume policy (`vaedist.config.settings.resume_policy`) says what a difference means: free, only
with `--override` and recorded, or never. The data are compared by their identity, a hash of keys, labels, splits and
pixels, not by their path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vaedist.config.job import Job
from vaedist.config.settings import ResumePolicy, parse, resume_policy
from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.runs.checkpoint_manifest import LoadedCheckpoint
from vaedist.runs.provenance import ABSENT, Change
from vaedist.runs.resolved_job import resolved


class Differences(NamedTuple):
    """Changes by what a resumed run may do with them."""

    free: tuple[Change, ...]
    override: tuple[Change, ...]
    fixed: tuple[Change, ...]


def data_section(index: Index) -> dict[str, Any]:
    """What a checkpoint says of the data it was trained on."""
    return {
        "identity": index.identity,
        "shape": list(index.spec.image_shape),
        "classes": list(index.classes),
        "path": str(Path(index.folder).absolute()),
    }


def compare_jobs(
    saved: Job, asked: Job, saved_data: Mapping[str, Any], asked_data: Mapping[str, Any]
) -> Differences:
    """The differences between two jobs (resolved here) and between the data they see (`data_section`)."""
    old, new = (resolved(job).model_dump(mode="json") for job in (saved, asked))
    patterns = dict(resume_policy(Job))
    del patterns["model"]
    patterns |= dict(resume_policy(type(asked.model), "model."))
    if saved.kind != asked.kind:  # the rest of two variants' settings has nothing in common
        old["model"], new["model"] = ({"kind": side["model"]["kind"]} for side in (old, new))
    by_policy: dict[ResumePolicy, list[Change]] = {"free": [], "override": [], "fixed": []}
    for change in _changes("", old, new):
        by_policy[_policy(change.key, patterns)].append(change)
    for key in ("identity", "shape", "classes"):
        if saved_data[key] != asked_data[key]:
            by_policy["fixed"].insert(0, Change(f"data {key}", saved_data[key], asked_data[key]))
    return Differences(*(tuple(by_policy[policy]) for policy in ("free", "override", "fixed")))


def check_differences(differences: Differences, override: bool, run_folder: Path) -> None:
    """Refuse what a resumed run may not change.

    Raises:
        UserError: naming each key, its old and its new value, and the ways out.
    """
    new_run = (
        f"start a new run beside it with --new-run (add init_from={run_folder} to begin with its weights)"
    )
    if differences.fixed:
        changes = "; ".join(str(change) for change in differences.fixed)
        raise UserError(
            f"cannot resume {run_folder}: {changes}. That never changes in a run: set it back, or {new_run}"
        )
    if differences.override and not override:
        changes = "; ".join(str(change) for change in differences.override)
        raise UserError(
            f"cannot resume {run_folder} just so: {changes}. Set it back, or accept and record the change with "
            f"--override, or {new_run}"
        )


def check_resume(
    run_folder: Path, checkpoint: LoadedCheckpoint | None, job: Job, index: Index, *, override: bool = False
) -> tuple[Change, ...]:
    """Compare a checkpoint's job and data with the asked ones; the changes that are allowed and worth a record.

    Raises:
        UserError: as `check_differences`.
    """
    if checkpoint is None:
        return ()
    saved = parse(Job, checkpoint.state["job"], where=str(checkpoint.path))
    differences = compare_jobs(saved, job, checkpoint.state["data"], data_section(index))
    check_differences(differences, override, run_folder)
    return differences.free + differences.override


def _changes(prefix: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(f"{prefix}{key}.", before, after)
        elif before != after:
            yield Change(f"{prefix}{key}", before, after)


def _policy(key: str, patterns: Mapping[str, ResumePolicy]) -> ResumePolicy:
    """The policy of a key: of its field, of the section it lies in, or the strictest of the fields below it."""
    parts = key.split(".")
    below: set[ResumePolicy] = set()
    for pattern, policy in patterns.items():
        names = pattern.split(".")
        if all(name in ("*", part) for name, part in zip(names, parts, strict=False)):
            if len(names) <= len(parts):
                return policy
            below.add(policy)
    return next((policy for policy in ("fixed", "override", "free") if policy in below), "fixed")
