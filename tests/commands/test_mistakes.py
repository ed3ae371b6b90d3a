"""Every mistake of `mistakes.txt` is made, and its message is compared with the sentence that stands there."""

from __future__ import annotations

import contextlib
import importlib
import re
import resource
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import mistakes
from tests.commands.conftest import pack_phantom

LIST = Path(__file__).with_name("mistakes.txt")
SMALLEST = 2048
"""Bytes that a file may have where there is no room."""


class Mistake(NamedTuple):
    """A command, and what it is answered."""

    command: str
    code: int
    sentence: str
    full: bool
    """Whether it is made on a full disk."""

    @property
    def command_name(self) -> str:
        return self.command.split()[0]


def read() -> list[Mistake]:
    found, full = [], False
    for block in LIST.read_text().split("\n\n"):
        if block.startswith("#"):
            full = block.startswith("# no room")
        elif block.startswith("$ "):
            command, answer = block.strip().split("\n")
            code, _, sentence = answer.partition("  ")
            found.append(Mistake(command.removeprefix("$ "), int(code), sentence, full))
    return found


TABLE = read()


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, data: Path, vae: Path, cvae: Path, vqvae: Path, prior: Path
) -> Path:
    """All that a command may be given."""
    place = tmp_path_factory.mktemp("mistakes")
    sound = {"data": data, "vae": vae, "cvae": cvae, "vqvae": vqvae, "prior": prior}
    for name, folder in sound.items():
        (place / name).symlink_to(folder)
    pack_phantom(place / "other", seed=1)
    pack_phantom(place / "big", size=32)
    mistakes.files(place, place / "data", place / "vqvae")
    mistakes.pictures(place)
    mistakes.packed(place, data)
    mistakes.runs(place, vae)
    return place


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all files below, those that a start makes and takes away again apart."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for top in (folder, *(one.resolve() for one in folder.iterdir() if one.is_symlink()))
        for path in top.rglob("*")
        if path.is_file() and path.is_relative_to(folder)
    }


@contextlib.contextmanager
def no_room(full: bool) -> Iterator[None]:
    """No file grows beyond 2 kB, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLEST, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def pattern(sentence: str, place: Path) -> str:
    """A regular expression for a sentence of the list."""
    parts = [re.escape(part) for part in sentence.replace("@", f"{place}/").split("...")]
    return ".*".join(parts)


@pytest.mark.parametrize("mistake", TABLE, ids=lambda one: one.command)
def test_a_mistake_is_one_sentence(
    mistake: Mistake,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--device cuda" in mistake.command:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU, so asking for one is no mistake")
    for name in ("VAEDIST_DATA", "VAEDIST_SITE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    before = contents(place)
    command, *words = shlex.split(mistake.command.replace("@", f"{place}/"))
    main = importlib.import_module(f"vaedist.{command}").main
    with no_room(mistake.full):
        try:
            code = main(words)
        except SystemExit as left:
            code = left.code
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith(f"vaedist-{command}: error: "), message
    sentence = message.removeprefix(f"vaedist-{command}: error: ").rstrip("\n")
    assert re.fullmatch(pattern(mistake.sentence, place), sentence), sentence
    assert code == mistake.code
    assert contents(place) == before, "it touched what it was given"
    if not mistake.full:
        assert [path.name for path in tmp_path.iterdir()] == [], "it left something behind"


def test_the_list_is_long_and_names_every_command() -> None:
    commands = {"shard", "train", "evaluate", "sample", "tune", "launch", "export", "board"}
    assert {mistake.command_name for mistake in TABLE} == commands
    assert len({one.command for one in TABLE}) >= 60
    assert len(TABLE) == LIST.read_text().count("\n$ ")


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "settings",
    [
        ["job.yaml", "train.monitor.metric=mse"],
        ["job.yaml", "train.monitor.metric=active_units", "train.monitor.mode=max"],
        ["prior.yaml", "train.monitor.metric=nats_per_token"],
    ],
    ids=" ".join,
)
def test_what_is_checked_before_training_is_what_validation_measures(
    settings: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A monitor is looked up among the terms of one batch; what passes there is found by every validation."""
    job, *rest = settings
    main = importlib.import_module("vaedist.train").main
    code = main([str(place / job), *rest, "train.steps=2", "-q"])
    message = capsys.readouterr().err
    assert code == 0, message
