"""Is a site file right? What can be known before a job waits in the queue for it, in one table.

Part of it is asked here, on the login node (is there such a partition, would sbatch take a job, may files be written);
the rest by a short job, which tells what a compute node sees: the shared folder, the node's own disk, the versions
there, and which `continue_by` works. That Slurm lets a job requeue itself is found by doing so: a job that is in the
queue again is the proof, and is then cancelled.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import vaedist
from vaedist.config.settings import expand
from vaedist.config.site import Site, load_site, seconds
from vaedist.core.errors import UserError, cli_command
from vaedist.core.files import as_json, replace_file
from vaedist.slurm.script import Batch, fill, template

_LITTLE_GIB = 10.0
_ASK_SECONDS = 60.0
_REQUEUE_SECONDS = 45.0
_LIBRARIES = ("torch", "ray", "numpy")
_PROBE = "vaedist.slurm.preflight"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    verdict: Literal["ok", "note", "WRONG"]
    told: str


def table(findings: list[Finding]) -> str:
    """The findings as text."""
    width = max(len(finding.what) for finding in findings)
    return "\n".join(f"{one.what.ljust(width)}  {one.verdict.ljust(5)}  {one.told}" for one in findings)


def check(site: Site, site_file: Path, python_folder: Path | None, wait: float) -> list[Finding]:
    """Everything, in the order in which a person would look.

    Args:
        wait: Seconds that the short job may stay in the queue; 0: no job is handed in.
    """
    version = _ask("sbatch", "--version")
    if version is None:
        return [Finding("Slurm", "WRONG", "there is no sbatch here: run this on a login node")]
    findings = [Finding("Slurm", "ok", version[1].strip()), _partition(site)]
    folder, shared = _shared(site)
    findings += shared
    if folder is None:
        return findings
    place = folder / f".vaedist-check-{secrets.token_hex(4)}"
    place.mkdir(mode=0o700)
    try:
        findings.append(_test_only(site, site_file, python_folder, place))
        if wait and findings[-1].verdict == "ok":
            findings += _on_a_node(site, site_file, python_folder, place, wait)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return findings


# On the login node ------------------------------------------------------------------------------------------


def _partition(site: Site) -> Finding:
    shown = _ask("scontrol", "show", "partition", "--oneliner", *([site.partition] if site.partition else []))
    if shown is None or shown[0] != 0:
        wrong = "scontrol does not answer" if shown is None else _words(shown[1])
        known = sorted(
            set(re.findall(r"PartitionName=(\S+)", (_ask("scontrol", "show", "partition") or (0, ""))[1]))
        )
        return Finding(
            "partition", "WRONG", f"{site.partition}: {wrong}; there are {', '.join(known) or 'none'}"
        )
    lines = [line for line in shown[1].splitlines() if site.partition or " Default=YES" in line]
    if not lines:
        return Finding(
            "partition", "WRONG", "this cluster has no default partition: set partition in the site file"
        )
    found = dict(re.findall(r"(\w+)=(\S+)", lines[0]))
    name, limit = found.get("PartitionName", "?"), found.get("MaxTime", "UNLIMITED")
    told = (
        f"{name}, {found.get('TotalNodes', '?')} nodes, {found.get('TotalCPUs', '?')} CPUs, at most {limit}"
    )
    asked = site.time_max or site.time
    try:
        if asked is not None and limit != "UNLIMITED" and seconds(asked) > seconds(limit):
            return Finding(
                "partition", "WRONG", f"{told}: time and time_max of the site file must not be longer"
            )
    except ValueError:
        pass  # a limit written in another way: sbatch --test-only will tell
    return Finding("partition", "ok" if found.get("State", "UP") == "UP" else "note", told)


def _shared(site: Site) -> tuple[Path | None, list[Finding]]:
    try:
        folder = Path.cwd() if site.scratch is None else expand(site.scratch, "scratch of the site file")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        token = folder / f".vaedist-{secrets.token_hex(4)}"
        token.touch(mode=0o600)
        token.unlink()
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return None, [Finding("shared folder", "WRONG", f"{folder}: {error.strerror}; set scratch")]
    except UserError as error:
        return None, [Finding("shared folder", "WRONG", str(error))]
    enough = free >= _LITTLE_GIB
    told = f"{folder} is writable, {free:.0f} GiB free" + ("" if enough else ": that is little")
    return folder, [Finding("shared folder", "ok" if enough else "note", told)]


def _batch(site: Site, place: Path) -> Batch:
    """A job as small as a job of this site can be."""
    short = site.time if site.time is not None and seconds(site.time) < 600 else "00:10:00"
    gpus = None if site.gpu_syntax == "none" else 1
    task = (str(place / "report.json"), str(place / "token"))
    return Batch("vaedist-check", (task,), str(place / "log"), gpus=gpus, time=short, module=_PROBE)


def _test_only(site: Site, site_file: Path, python_folder: Path | None, place: Path) -> Finding:
    try:
        text = fill(
            template("chain"), replace(_batch(site, place), gpus=None), site, site_file, python_folder
        )
    except UserError as error:
        return Finding("sbatch --test-only", "WRONG", str(error))
    (place / "test").write_text(text, encoding="utf-8")
    answer = _ask("sbatch", "--test-only", str(place / "test"), environment=clean(os.environ))
    if answer is None or answer[0] != 0:
        return Finding("sbatch --test-only", "WRONG", "no answer" if answer is None else _words(answer[1]))
    return Finding("sbatch --test-only", "ok", _words(answer[1]))


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what sbatch would take for options."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    return {
        name: value
        for name, value in environment.items()
        if name in kept or not name.startswith(("SBATCH_", "SLURM_", "VAEDIST_"))
    }


# On a compute node ------------------------------------------------------------------------------------------


def _on_a_node(
    site: Site, site_file: Path, python_folder: Path | None, place: Path, wait: float
) -> list[Finding]:
    token = secrets.token_hex(8)
    (place / "token").write_text(token)
    (place / "probe").write_text(
        fill(template("chain"), _batch(site, place), site, site_file, python_folder), encoding="utf-8"
    )
    answer = _ask("sbatch", "--parsable", str(place / "probe"), environment=clean(os.environ))
    if answer is None or answer[0] != 0:
        return [Finding("a job", "WRONG", "no answer" if answer is None else _words(answer[1]))]
    number = answer[1].strip().partition(";")[0]
    try:
        report = _report(number, place, wait)
        if isinstance(report, Finding):
            return [report]
        requeued = _requeued(number) if report["requeue"] == "" else False
        return _told(site, report, token, requeued=requeued)
    finally:
        _ask("scancel", number)


def _report(number: str, place: Path, wait: float) -> dict[str, Any] | Finding:
    begun = time.monotonic()
    state = ""
    while time.monotonic() - begun < wait:
        if (place / "report.json").exists():
            content: dict[str, Any] = json.loads((place / "report.json").read_text())
            return content
        shown = _ask("scontrol", "show", "job", "--oneliner", number)
        state = (re.findall(r"JobState=(\S+)", shown[1]) or [""])[0] if shown else ""
        if state and state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            time.sleep(2)  # a network disk may show the file a little later
            if (place / "report.json").exists():
                continue
            break
        time.sleep(1)
    else:
        return Finding(
            "a job", "note", f"job {number} has not told anything after {wait:.0f} s ({state}): cancelled"
        )
    try:
        said = _words((place / "log").read_text(errors="replace"))
    except OSError:
        said = f"and nothing in {place.parent}: do the compute nodes see this folder?"
    return Finding("a job", "WRONG", f"job {number} ended as {state}: {said}")


def _requeued(number: str) -> bool:
    begun = time.monotonic()
    while time.monotonic() - begun < _REQUEUE_SECONDS:
        shown = _ask("scontrol", "show", "job", "--oneliner", number)
        if shown and re.search(r"\bRestarts=[1-9]", shown[1]):
            return True
        time.sleep(1)
    return False


def _told(site: Site, report: dict[str, Any], token: str, *, requeued: bool) -> list[Finding]:
    here = _versions()
    findings = [
        Finding("a job", "ok", f"ran on {report['node']}, {report['cpus']} CPUs, {report['gpus']} GPUs")
    ]
    same = report["token"] == token
    findings.append(
        Finding(
            "shared folder there",
            "ok" if same else "WRONG",
            "the same" if same else "not what is here: set scratch",
        )
    )
    others = {name: value for name, value in report["versions"].items() if here.get(name) != value}
    told = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    findings.append(
        Finding(
            "versions there", "note" if others else "ok", told + (f" (here other: {here})" if others else "")
        )
    )
    if report["node_local"] is not None:
        findings.append(Finding("node-local", report["node_local"][0], report["node_local"][1]))
    if site.interface is not None:
        wanted = re.sub(r"^[=^]+", "", site.interface).split(",")
        there = [name for name in report["interfaces"] if name.startswith(tuple(wanted))]
        ok = bool(there) or site.interface.startswith("^")
        findings.append(
            Finding(
                "interface",
                "ok" if ok else "WRONG",
                f"{site.interface}; there are {', '.join(report['interfaces'])}",
            )
        )
    works = {"requeue": requeued, "resubmit": report["resubmit"] == "", "none": True}
    told = ", ".join(
        f"{name} works" if ok else f"{name} does not" for name, ok in works.items() if name != "none"
    )
    why = "; ".join(text for text in (report["requeue"], report["resubmit"]) if text)
    findings.append(
        Finding(
            f"continue_by: {site.continue_by}",
            "ok" if works[site.continue_by] else "WRONG",
            told + (f" ({why})" if why else ""),
        )
    )
    return findings


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "vaedist": vaedist.__version__}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _node_local(site: Site) -> tuple[str, str] | None:
    if site.node_local is None:
        return None
    try:
        folder = Path(site.node_local_folder() or "")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = folder / f".vaedist-{secrets.token_hex(4)}"
        probe.touch(mode=0o600)
        probe.unlink()
        return "ok", f"{folder} is writable, {shutil.disk_usage(folder).free / 2**30:.1f} GiB free"
    except UserError as error:
        return "WRONG", str(error)
    except OSError as error:
        return "WRONG", f"{site.node_local}: {error.strerror}; shards would be read from the shared folder"


@cli_command
def main(argv: list[str] | None = None) -> int:
    """The short job's part: look around, write the report, and try to be put back into the queue."""
    report, token = (Path(text) for text in (sys.argv[1:] if argv is None else argv))
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        return 0  # this is the proof that requeueing works
    site = load_site(os.environ["VAEDIST_SITE"])
    number = os.environ.get("SLURM_JOB_ID", "")
    reach = _ask("scontrol", "show", "job", number)
    allowed = reach is not None and reach[0] == 0
    if allowed and site.continue_by != "requeue":
        _ask("scontrol", "update", f"jobid={number}", "requeue=1")  # to see whether it would work
    dependent = _ask("sbatch", "--test-only", f"--dependency=afterany:{number}", "--time=1", "--wrap=true")
    content = {
        "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "cpus": os.environ.get("SLURM_CPUS_ON_NODE", "?"),
        "gpus": os.environ.get("SLURM_GPUS_ON_NODE", "0") or "0",
        "token": token.read_text() if token.exists() else None,
        "versions": _versions(),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "node_local": _node_local(site),
        "requeue": "" if allowed else "scontrol is not in reach on a compute node",
        "resubmit": _refusal(dependent, "sbatch is not in reach on a compute node"),
    }
    replace_file(report, as_json(content))
    if allowed:
        _ask("scontrol", "requeue", number)
    return 0


def _refusal(answer: tuple[int, str] | None, silent: str) -> str:
    return silent if answer is None else "" if answer[0] == 0 else _words(answer[1])


def _ask(*command: str, environment: Mapping[str, str] | None = None) -> tuple[int, str] | None:
    """Exit code and both outputs; None: there is no such program, or it does not answer."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ASK_SECONDS, check=False, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.returncode, done.stdout + done.stderr


def _words(text: str) -> str:
    """The last line that a program of Slurm said, without its own name."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^(\w+: )(error: )?", "", lines[-1]) if lines else "no answer"


if __name__ == "__main__":
    raise SystemExit(main())
