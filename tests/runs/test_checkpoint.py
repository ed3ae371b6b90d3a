"""Checkpoints are whole or absent, whatever happens while they are written, and reading one never runs code."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vaedist.core.errors import UserError
from vaedist.runs.checkpoint import Best, Checkpoints, Committer, load_checkpoint
from vaedist.runs.checkpoint_manifest import checkpoint_from_bytes, checkpoint_to_bytes
from vaedist.runs.checkpoint_paths import best_checkpoint, resolve_checkpoint, run_folder_of
from vaedist.runs.init_from import source_from_bytes, source_to_bytes
from vaedist.runs.weights import chosen_weights, weights_digest


def nobody_else() -> None:
    """The guard of a run whose lock is not in question."""


def a_state(step: int, size: int = 1000) -> dict[str, Any]:
    weight = torch.nn.Parameter(torch.arange(float(size)) + step)
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    return {
        "step": step,
        "model": {"weight": weight.detach().clone()},
        "ema": {"weight": weight.detach() / 2},
        "optim": {"main": optimizer.state_dict()},
        "sched": {"main": {"factor": 1.0, "best": None, "waited": 0}},
        "job": {"train": {"weights": "ema"}, "model": {"kind": "vae"}},
        "data": {"classes": ["a", "b"], "shape": [1, 8, 8]},
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def names(store: Checkpoints) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def rewrite(path: Path, state: bytes) -> None:
    """Put other bytes in a checkpoint, with a manifest that agrees with them."""
    (path / "state.pt").write_bytes(state)
    entry = {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": 1, "files": {"state.pt": entry}}))


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path, keep=2)


def test_what_is_committed_comes_back_equal_and_travels_as_bytes(store: Checkpoints) -> None:
    state = a_state(7)
    path = store.commit(state, 7, guard=nobody_else)
    found = store.newest()
    assert found is not None and (found.step, found.path) == (7, path)
    for loaded in (found, load_checkpoint(path), checkpoint_from_bytes(checkpoint_to_bytes(found))):
        assert loaded is not None and loaded.path == path
        assert same(loaded.state, state)
    assert checkpoint_from_bytes(checkpoint_to_bytes(None)) is None
    assert Checkpoints(store.run_folder).newest() is not None
    assert oct(store.folder.stat().st_mode & 0o777) == oct(path.stat().st_mode & 0o777) == "0o700"


def test_a_run_without_checkpoints_has_none(store: Checkpoints) -> None:
    assert store.newest() is None
    with pytest.raises(UserError, match=r"no checkpoint in .*train it first"):
        resolve_checkpoint(store.run_folder)
    with pytest.raises(UserError, match="no run at"):
        resolve_checkpoint(store.run_folder / "nothing")


KILLED = """
import os, sys, time
from pathlib import Path
from tests.runs.test_checkpoint import a_state
from vaedist.runs.checkpoint import Checkpoints
def guard():
    print("written, not yet renamed", flush=True)
    time.sleep(600)
Checkpoints(Path(sys.argv[1])).commit(a_state(2), 2, guard=guard)
"""


def test_a_write_that_is_killed_leaves_the_checkpoint_before_and_is_removed(
    store: Checkpoints, repository: Path
) -> None:
    before = store.commit(a_state(1), 1, guard=nobody_else)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(store.run_folder)],
        cwd=repository,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline().startswith("written")
        process.send_signal(signal.SIGKILL)
    (left,) = (name for name in names(store) if name != before.name)
    assert left.startswith(".tmp-") and (store.folder / left / "manifest.json").exists()
    (store.folder / "notes").write_text("not ours")
    (store.run_folder / ".tmporary").write_text("not ours either")

    assert resolve_checkpoint(store.run_folder) == before
    assert left in names(store), "a command that only reads removes nothing"
    found = store.newest()
    assert found is not None and found.path == before
    assert names(store) == ["notes", before.name]
    assert (store.run_folder / ".tmporary").exists()


def damage_truncate(path: Path) -> None:
    os.truncate(path / "state.pt", 1000)


def damage_flip(path: Path) -> None:
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)


def damage_hole(path: Path) -> None:
    content = bytearray((path / "state.pt").read_bytes())
    content[512:1536] = bytes(1024)
    (path / "state.pt").write_bytes(content)


def damage_no_state(path: Path) -> None:
    (path / "state.pt").unlink()


def damage_no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def damage_empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"")


def damage_manifest_list(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [value for name, value in sorted(globals().items()) if name.startswith("damage_")],
    ids=lambda damage: damage.__name__.removeprefix("damage_"),
)
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
    store: Checkpoints, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    sound = store.commit(a_state(100), 100, guard=nobody_else)
    broken = store.commit(a_state(200), 200, guard=nobody_else)
    damage(broken)
    with pytest.raises(UserError, match=r"step-000000200 is damaged.*step-000000100"):
        load_checkpoint(resolve_checkpoint(broken))

    with caplog.at_level(logging.WARNING, "vaedist"):
        found = store.newest()
    assert found is not None and found.path == sound
    (record,) = caplog.records
    assert str(broken) in record.getMessage() and "damaged" in record.getMessage()

    # The run goes on from 100: the damaged 200 may neither come back nor count as one of the two that are kept.
    for step in (120, 140):
        store.commit(a_state(step), step, guard=nobody_else)
        store.prune()
    kept = [name for name in names(store) if not name.startswith("damaged-")]
    assert kept == ["step-000000120", "step-000000140"]
    caplog.clear()
    again = store.newest()
    assert again is not None and again.step == 140 and not caplog.records


def test_where_no_checkpoint_is_sound_the_run_does_not_silently_start_over(store: Checkpoints) -> None:
    damage_flip(store.commit(a_state(1), 1, guard=nobody_else))
    for _ in range(2):  # also when asked again, after the damaged one was put aside
        with pytest.raises(UserError, match=r"no sound checkpoint is left.*damaged-step-000000001"):
            store.newest()


def test_a_guard_that_objects_leaves_nothing_behind(store: Checkpoints) -> None:
    def lost() -> None:
        raise UserError("the lock is lost")

    store.commit(a_state(1), 1, guard=nobody_else)
    with pytest.raises(UserError, match="lock is lost"):
        store.commit(a_state(2), 2, guard=lost)
    assert names(store) == ["step-000000001"]


def test_a_takeover_between_guard_and_rename_is_noticed(store: Checkpoints) -> None:
    """The old holder sleeps right after its guard; the new one starts, and that sweeps the old one's folder."""
    asked = []

    def sleeps() -> None:
        asked.append(1)
        if len(asked) == 1:
            Checkpoints(store.run_folder).newest()
        else:
            raise UserError("the lock is no longer ours")

    with pytest.raises(UserError, match="no longer ours"):
        store.commit(a_state(2), 2, guard=sleeps)
    assert names(store) == []


FULL = """
import resource, sys
from pathlib import Path
from tests.runs.test_checkpoint import a_state, names
from vaedist.core.errors import UserError
from vaedist.runs.checkpoint import Checkpoints
store = Checkpoints(Path(sys.argv[1]))
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
store.commit(a_state(1), 1, guard=lambda: None)
try:
    store.commit(a_state(2, size=1_000_000), 2, guard=lambda: None)
except UserError as error:
    print(error)
assert names(store) == ["step-000000001"], names(store)
assert store.newest().step == 1
store.commit(a_state(3), 3, guard=lambda: None)
"""


@pytest.mark.parametrize("kind", ["limit", "tmpfs"])
def test_a_full_disk_is_one_sentence_and_older_checkpoints_are_intact(
    tmp_path: Path, repository: Path, kind: str
) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path), kind]
    if kind == "tmpfs":
        mounted = [
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'mount -t tmpfs -o size=1m none "{tmp_path}" && exec "$@"',
            "sh",
        ]
        if subprocess.run([*mounted, "true"], capture_output=True).returncode != 0:
            pytest.skip("mounting a small tmpfs needs root")
        command = [*mounted, *command]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert (
        line.startswith("no room to write the checkpoint of step 2")
        and "checkpoints written before are intact" in line
    )


def test_the_newest_and_the_best_are_kept(store: Checkpoints) -> None:
    for step in (10, 20, 30, 40):
        path = store.commit(a_state(step), step, guard=nobody_else)
        if step == 20:
            store.mark_best(path, Best("loss", 1.5))
        store.prune()
    assert names(store) == ["step-000000020", "step-000000030", "step-000000040"]
    assert (
        best_checkpoint(store.run_folder)
        == resolve_checkpoint(store.run_folder)
        == store.folder / "step-000000020"
    )
    assert resolve_checkpoint(store.folder / "step-000000030").name == "step-000000030"
    found = store.newest()
    assert found is not None and found.step == 40
    assert run_folder_of(found.path) == store.run_folder

    shutil.rmtree(store.folder / "step-000000020")
    assert best_checkpoint(store.run_folder) is None
    assert resolve_checkpoint(store.run_folder).name == "step-000000040"


@pytest.mark.parametrize("pointer", ['{"checkpoint": "../../elsewhere"}', "{", '{"checkpoint": 3}', "[]"])
def test_a_foreign_best_pointer_leads_nowhere_else(store: Checkpoints, pointer: str) -> None:
    newest = store.commit(a_state(1), 1, guard=nobody_else)
    (store.run_folder / "best.json").write_text(pointer)
    assert resolve_checkpoint(store.run_folder) == newest


def test_a_step_saved_twice_never_replaces_the_first(store: Checkpoints) -> None:
    first = store.commit(a_state(5), 5, guard=nobody_else)
    second = store.commit(a_state(5) | {"job": {"train": {"weights": "raw"}}}, 5, guard=nobody_else)
    assert first != second and load_checkpoint(first).state["job"] != load_checkpoint(second).state["job"]
    found = store.newest()
    assert found is not None and found.path == second


class Trap:
    def __init__(self, bait: Path) -> None:
        self.bait = bait

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.bait),)


@pytest.mark.parametrize("packed", ["archive", "bare pickle"])
def test_a_foreign_checkpoint_cannot_run_code(store: Checkpoints, tmp_path: Path, packed: str) -> None:
    path, bait = store.commit(a_state(1), 1, guard=nobody_else), tmp_path / "sprung"
    if packed == "archive":
        torch.save({"model": Trap(bait)}, tmp_path / "evil.pt")
        evil = (tmp_path / "evil.pt").read_bytes()
    else:
        evil = pickle.dumps({"model": Trap(bait)})
    rewrite(path, evil)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)
    assert not bait.exists()


def test_an_archive_that_would_unfold_is_refused(store: Checkpoints, tmp_path: Path) -> None:
    path = store.commit({"model": torch.zeros(1_000_000)}, 1, guard=nobody_else)
    bomb = tmp_path / "bomb"
    with (
        zipfile.ZipFile(path / "state.pt") as plain,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    rewrite(path, bomb.read_bytes())
    with pytest.raises(UserError, match="compressed members"):
        load_checkpoint(path)


def test_a_newer_format_is_not_called_damage(store: Checkpoints) -> None:
    path = store.commit(a_state(1), 1, guard=nobody_else)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(UserError, match="format 2, this vaedist reads up to 1"):
        store.newest()
    assert path.exists(), "put aside although it is sound"


def test_what_could_not_be_read_again_is_not_written(store: Checkpoints) -> None:
    for value in (np.float64(1.0), {1, 2}, Path("x"), object()):
        with pytest.raises(AssertionError, match=r"state\.progress\[0\]\.best"):
            store.commit({"progress": [{"best": value}]}, 1, guard=nobody_else)
    assert names(store) == []


def test_the_committer_writes_one_at_a_time_and_raises_in_the_loop(store: Checkpoints) -> None:
    gate, entered, objection = threading.Event(), threading.Event(), []

    def guard() -> None:
        entered.set()
        gate.wait()
        if objection:
            raise UserError(objection[0])

    committer = Committer(store, guard)
    committer.submit(a_state(1), 1, Best("loss", 3.0))
    assert entered.wait(30), "the commit does not run beside the loop"
    assert not [name for name in names(store) if name.startswith("step-")]
    gate.set()
    committer.submit(a_state(2), 2)
    assert "step-000000001" in names(store), "the second did not wait for the first"
    committer.submit(a_state(3), 3)
    committer.submit(a_state(4), 4)
    committer.join()
    assert names(store) == [f"step-00000000{step}" for step in (1, 3, 4)]
    assert json.loads((store.run_folder / "best.json").read_text()) == {
        "checkpoint": "step-000000001",
        "metric": "loss",
        "value": 3.0,
    }

    objection.append("the lock is lost")
    committer.submit(a_state(5), 5)
    with pytest.raises(UserError, match="lock is lost"):
        committer.submit(a_state(6), 6)
    committer.close()
    assert names(store)[-1] == "step-000000004"


def test_one_rule_for_the_weights_that_everything_downstream_uses(store: Checkpoints) -> None:
    state = a_state(3)
    assert chosen_weights(state) is state["ema"]
    assert chosen_weights(state, "raw") is state["model"]
    with pytest.raises(UserError, match="not averaged"):
        chosen_weights(state | {"ema": None})
    store.commit(state, 3, guard=nobody_else)
    carried = source_from_bytes(source_to_bytes(store.run_folder), "there")
    assert (carried.run, carried.step, carried.which, carried.optim) == ("there", 3, "ema", {})
    assert torch.equal(carried.weights["weight"], state["ema"]["weight"])
    assert carried.sha256 == hashlib.sha256((Path(carried.path) / "state.pt").read_bytes()).hexdigest()
    raw = source_from_bytes(source_to_bytes(store.run_folder, "raw", optimizer=True), "there")
    assert torch.equal(raw.weights["weight"], state["model"]["weight"]) and same(raw.optim, state["optim"])


def test_a_digest_is_of_names_shapes_and_values() -> None:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(2)}
    known = weights_digest(weights)
    assert weights_digest(dict(reversed(weights.items()))) == known
    assert weights_digest({**weights, "a": weights["a"].double()}) == known, "fp32 weights held in fp64"
    for other in (
        {**weights, "a": weights["a"].view(3, 2)},
        {**weights, "a": weights["a"] + 1e-6},
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["a"]},
    ):
        assert weights_digest(other) != known
