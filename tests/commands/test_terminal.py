"""What a person sees on a terminal, and what stands in a log: bars, colours, -q, -v, --version and shell completion."""

from __future__ import annotations

import importlib
import io
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shtab

import vaedist
from tests.spaces import small_space, write_space
from vaedist.core.errors import UserError, cli_command
from vaedist.core.terminal import colored

COMMANDS = ("shard", "train", "evaluate", "sample", "tune", "launch", "export", "board")
PHANTOM = ["phantom", "--out", "packed", "--size", "16", "--count", "train=64,validate=16"]
RED, OFF = "\x1b[1;31m", "\x1b[0m"


class Terminal:
    """A pseudo-terminal, standard error inside `with`; `seen` is what was written to it."""

    def __init__(self) -> None:
        self._main, side = pty.openpty()
        self.stream = os.fdopen(side, "w", buffering=1)
        self._seen = b""
        self.seen = ""
        self._reader = threading.Thread(target=self._read, daemon=True)  # its buffer holds 4 kB only
        self._reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self._main, 4096):
                self._seen += part
        except OSError:  # the other side is closed
            return

    def __enter__(self) -> Terminal:
        self._before, sys.stderr = sys.stderr, self.stream  # here: pytest sets its own before each test
        return self

    def __exit__(self, *_: object) -> None:
        sys.stderr = self._before
        self.stream.close()
        self._reader.join(20)
        os.close(self._main)
        self.seen = self._seen.decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def call(verb: str, *words: object) -> int:
    code: int = importlib.import_module(f"vaedist.{verb}").main([str(word) for word in words])
    return code


# ProgressBars ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, vae: Path) -> Path:
    """The job of `vae`, of which every default is written out."""
    place = tmp_path_factory.mktemp("job") / "job.yaml"
    place.write_text((vae / "job.yaml").read_text())
    return place


@pytest.fixture
def commands(vae: Path, job: Path) -> dict[str, list[object]]:
    return {
        "shard": PHANTOM,
        "train": [job, "--run-dir", "run"],
        "evaluate": [vae, "--out", "results", "--importance", "0"],
        "sample": [vae, "--num-samples", "70"],
    }


BARS = {"shard": "packing", "train": "4/4", "evaluate": "evaluate", "sample": "drawing"}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("verb", BARS)
def test_a_long_operation_shows_a_bar_on_a_terminal(
    verb: str, commands: dict[str, list[object]], terminal: Terminal
) -> None:
    with terminal:
        assert call(verb, *commands[verb]) == 0
    assert BARS[verb] in terminal.seen and "%|" in terminal.seen and "\r" in terminal.seen


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("verb", BARS)
def test_quiet_is_silent_on_a_terminal_too(
    verb: str, commands: dict[str, list[object]], terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    with terminal:
        assert call(verb, *commands[verb], "-q") == 0
    assert terminal.seen == ""
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("verb", BARS)
def test_a_log_file_has_plain_lines_and_no_bar(
    verb: str, commands: dict[str, list[object]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(verb, *commands[verb]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out and not {"\r", "\x1b"} & set(out)


SAID = {
    "shard": (1, "packing: 80 images, "),
    "train": (0, "step 4: a checkpoint goes to "),
    "evaluate": (1, "evaluate: 21 images, "),
    "sample": (1, "drawing: 70 images, "),
}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("verb", SAID)
def test_verbose_says_more(
    verb: str, commands: dict[str, list[object]], capsys: pytest.CaptureFixture[str]
) -> None:
    stream, message = SAID[verb]
    assert call(verb, *commands[verb], "-v") == 0
    assert message in capsys.readouterr()[stream]


def test_training_names_its_libraries_only_when_asked(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, named in ([], False), (["-v"], True):
        assert call("train", job, "--run-dir", tmp_path / str(named), *words) == 0
        assert (f"vaedist {vaedist.__version__}" in capsys.readouterr().out) == named


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("words", [[], ["-q"]])
def test_a_search_shows_a_bar_over_its_trials(
    words: list[str],
    phantom: Path,
    tmp_path: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ray is not started: what stands for it tells what it would."""

    def run(*_: Any, echo: Callable[[str], None], progress: Callable[[int, int], None], **__: Any) -> None:
        progress(0, 3)
        echo("trial 0 finished")
        progress(1, 3)
        raise UserError("that is enough")

    monkeypatch.setattr("vaedist.launchers.ray.tuner.run", run)
    space = write_space(tmp_path / "space.yaml", small_space(phantom))
    with terminal:
        assert call("tune", "--space", space, *words) == 2
    assert ("1/3" in terminal.seen) == (not words)
    assert ("trial 0 finished" in capsys.readouterr().out) == (not words)


# Colours -----------------------------------------------------------------------------------------------------


@cli_command
def broken(argv: list[str] | None = None) -> int:
    raise UserError("no such thing; give another")


@pytest.mark.parametrize(
    ("environment", "red"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
    ids=str,
)
def test_an_error_is_red_where_colors_are_wanted(
    environment: dict[str, str], red: bool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with terminal:
        assert broken([]) == 2
    shown = f"{RED}error:{OFF}" if red else "error:"
    assert terminal.seen.rstrip().endswith(f": {shown} no such thing; give another")


def test_no_color_goes_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colored("ALARM:", "yellow", io.StringIO()) == "ALARM:"


def test_a_wrong_option_is_red_too(terminal: Terminal) -> None:
    with terminal, pytest.raises(SystemExit):
        call("board", "--prot", "1")
    assert f"{RED}error:{OFF} there is no option --prot; did you mean --port?" in terminal.seen


# Options of every command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_command_prints_its_version(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        call(verb, "--version")
    assert left.value.code == 0
    assert capsys.readouterr().out == f"vaedist-{verb} {vaedist.__version__}\n"


def options(verb: str) -> dict[str, Any]:
    parser = importlib.import_module(f"vaedist.{verb}").build_parser()
    return {name: action for action in parser._actions for name in action.option_strings}


def test_an_option_of_one_name_is_one_thing_in_every_command() -> None:
    """Same metavar, choices and short form: what is learnt of one command holds for the next."""
    kinds: dict[str, dict[str, tuple[object, ...]]] = {}
    for verb in COMMANDS:
        for name, action in options(verb).items():
            choices = None if action.choices is None else tuple(action.choices)
            kinds.setdefault(name, {})[verb] = (action.nargs, action.metavar, choices)
    differ = {name: found for name, found in kinds.items() if len(set(found.values())) > 1}
    # vaedist-train has elastic workers and starts ranks here too; what vaedist-sample makes is one picture.
    assert set(differ) == {"--workers", "--engine", "--out"}


# Completion --------------------------------------------------------------------------------------------------

COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
"$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\).*/\\1/')"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["train", "--max-f"], {"--max-failures"}),
        (["train", "job.yaml", "--engine", ""], {"local", "ray", "srun"}),
        (["train", "jo"], {"job.yaml", "jobs"}),
        (["train", "job.yaml", "--run-dir", "jo"], {"jobs"}),
        (["sample", "--sampler", "g"], {"gmm"}),
        (["sample", "jo"], {"jobs"}),
        (["launch", "job.yaml", "--print-"], {"--print-env", "--print-completion"}),
        (["shard", "--codec", ""], {"png", "npy"}),
    ],
    ids=" ".join,
)
def test_bash_completes(
    words: list[str], wanted: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        call(words[0], "--print-completion", "bash")
    assert left.value.code == 0
    (tmp_path / "job.yaml").touch()
    (tmp_path / "jobs").mkdir()
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    command = ["bash", "-c", COMPLETE, "bash", str(script), f"vaedist-{words[0]}", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr == ""
    assert set(done.stdout.split()) - {"script"} == wanted


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_shell_gets_a_script(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for shell in set(shtab.SUPPORTED_SHELLS) & {"bash", "zsh", "tcsh"}:
        with pytest.raises(SystemExit) as left:
            call(verb, "--print-completion", shell)
        assert left.value.code == 0
        assert f"vaedist-{verb}" in capsys.readouterr().out
