"""TensorBoard as vaedist-board starts it: it shows a real run to who knows the path, and nothing to anybody else."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


class Board:
    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "vaedist.board", str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.output = ""
        while "Ctrl-C" not in self.output:
            line = self.process.stdout.readline()
            assert line, self.process.communicate()
            self.output += line
        found = re.search(r"open +(http://localhost:(\d+)/[0-9a-f]{32}/)", self.output)
        assert found is not None, self.output
        self.url, self.port = found[1], int(found[2])


@pytest.fixture(scope="module")
def board(vae: Path) -> Iterator[Board]:
    started = Board(vae)
    yield started
    started.process.kill()
    started.process.communicate()


def get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_it_shows_the_run(board: Board) -> None:
    assert get(board.url)[0] == 200
    deadline = time.monotonic() + 60
    while True:
        tags = json.loads(get(f"{board.url}data/plugin/scalars/tags")[1])
        if tags and any("loss" in name for run in tags.values() for name in run):
            break
        assert time.monotonic() < deadline, tags
        time.sleep(0.5)
    assert f"ssh -N -L {board.port}:localhost:{board.port} " in board.output


def test_without_the_path_there_is_nothing(board: Board) -> None:
    top = f"http://localhost:{board.port}"
    for path in ("/", "/data/plugin/scalars/tags", "/index.html", f"/{'0' * 32}/"):
        assert get(top + path)[0] == 404
    process = psutil.Process(board.process.pid)
    assert board.url.rstrip("/").rpartition("/")[2] not in " ".join(process.cmdline())


def test_it_listens_on_one_port_of_the_loopback_address(board: Board) -> None:
    family = [psutil.Process(board.process.pid), *psutil.Process(board.process.pid).children(recursive=True)]
    listening = {
        (one.laddr.ip, one.laddr.port)
        for process in family
        for one in process.net_connections()
        if one.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", board.port)}


def test_an_interrupt_ends_it_without_a_word(vae: Path) -> None:
    board = Board(vae)
    board.process.send_signal(signal.SIGTERM)
    output, errors = board.process.communicate(timeout=30)
    assert (board.process.returncode, output, errors) == (0, "", "")


def test_mistakes_are_one_sentence(board: Board, vae: Path, tmp_path: Path) -> None:
    for words, sentence in (
        ([str(tmp_path / "nowhere")], "there is no folder"),
        ([str(vae), "--port", "70000"], "--port is 70000"),
        ([str(vae), "--port", str(board.port)], f"port {board.port} of this machine is taken"),
    ):
        command = [sys.executable, "-m", "vaedist.board", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stdout) == (2, "")
        error = done.stderr.strip().splitlines()
        assert len(error) == 1 and sentence in error[0]
