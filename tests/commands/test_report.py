"""`vaedist-evaluate --report`: one file that needs nothing else, in which nothing of a run is taken for markup."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.commands.conftest import MLP, pack_phantom, trained
from vaedist.evaluate import main

HOSTILE = "<script>alert('run')</script>&\"'"


class Page(HTMLParser):
    """Tags that are open, texts by the tag they stand in, sources of images, and headings."""

    VOID = frozenset({"meta", "img", "input", "br", "link", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def headings(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose name, classes and record of starts try to be markup."""
    folder = tmp_path_factory.mktemp("hostile")
    data = pack_phantom(folder / "data & <b>")
    document = json.loads((data / "index.json").read_text())
    document["classes"] = [HOSTILE, *document["classes"][1:]]
    (data / "index.json").write_text(json.dumps(document))
    run = trained(folder / "run", data, {"kind": "vae", "encoder": MLP, "latent": 3})
    record = run / "provenance.json"
    starts = json.loads(record.read_text())
    starts[0]["command"] = HOSTILE
    record.write_text(json.dumps(starts))
    return run


def test_the_file_needs_nothing_else(vae: Path, vqvae: Path, prior: Path, cvae: Path, tmp_path: Path) -> None:
    report = tmp_path / "new" / "report.html"
    options = ["--importance", "4", "--samples", "12", "--audit", "--out", str(tmp_path / "out")]
    assert main([str(vae), str(vqvae), str(prior), str(cvae), *options, "--report", str(report)]) == 0
    assert report.stat().st_size < 10 << 20
    page = read(report)
    links = [
        value
        for _, given in page.tags
        for name, value in given.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert all(
        link.startswith(("#", "data:image/png;base64,")) or link == "" for link in links if link is not None
    )
    assert not re.search(r"@import|url\((?!#)", report.read_text())
    pictures = [given["src"] for tag, given in page.tags if tag == "img" and given.get("src")]
    for uri in pictures:
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).verify()
    assert all(given.get("alt") is not None for tag, given in page.tags if tag == "img")
    assert page.headings("h2") == ["Comparison", "vae", "vqvae", "prior", "cvae", "How it was made"]
    everywhere = ["Curves of training", "Data", "Settings", "Every number"]
    of_numbers = ["Reconstructions", "Samples", "Latents", "Does it repeat its training images?", *everywhere]
    of_codes = ["Reconstructions", "Codes", *everywhere]
    of_prior = ["Samples", "Codes", "Does it repeat its training images?", *everywhere]
    found = page.headings("h3")
    assert found[: len(of_numbers) + len(of_codes)] == of_numbers + of_codes
    assert found[-len(of_numbers) :] == of_numbers
    assert set(of_prior) <= set(found[len(of_numbers) + len(of_codes) : -len(of_numbers)])
    # Numbers are those that were written, once more.
    metrics = json.loads((tmp_path / "out/vae/metrics.json").read_text())["metrics"]
    assert any(
        f"{metrics['ssim']['mean']:.4f} ±{metrics['ssim']['std']:.4f}" == text for _, text in page.texts
    )


def test_nothing_of_a_run_is_taken_for_markup(hostile: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert main([str(hostile), "--importance", "0", "--out", str(tmp_path), "--report", str(report)]) == 0
    page = read(report)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert HOSTILE in [text for _, text in page.texts]  # as text: the command
    assert any(HOSTILE in text for _, text in page.texts if text != HOSTILE)  # and the class


def test_a_report_is_an_html_file(vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(vae), "--report", "report.pdf"]) == 2
    assert "let it end in .html" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed here")
def test_a_browser_has_nothing_to_complain_of(vae: Path, vqvae: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert (
        main([str(vae), str(vqvae), "--importance", "0", "--out", str(tmp_path), "--report", str(report)])
        == 0
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'c'}",
    ]
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", report.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    assert "CONSOLE" not in done.stderr
    page = Page(done.stdout)
    viewers = [
        given for tag, given in page.tags if tag == "div" and "viewer" in (given.get("class") or "").split()
    ]
    assert len(viewers) == 2 and all("hidden" not in given for given in viewers)
    assert sum(text.startswith("1 of ") for _, text in page.texts) == 2
