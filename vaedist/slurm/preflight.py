"""Is a site file right? What can be known before a job waits in the queue for it, in one table.

Part of it is asked here, on the login node (is there such a partition, would sbatch take a job, may files be written).
The rest comes from a short job, which reports what a compute node sees: the shared folder, the node's own disk, the
versions there, and which `continue_by` works. Whether Slurm lets a job requeue itself is found by trying: a job that is
in the queue again is the proof, and is then cancelled.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import socket
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import vaedist
from vaedist.config.settings import expand
from vaedist.config.site import Site, load_site, seconds
from vaedist.core.errors import UserError, cli_command
from vaedist.core.files import as_json, replace_file
from vaedist.slurm.batch_job import environment_without, node_name, slurm_command, slurm_output
from vaedist.slurm.script import BatchSpec, batch_script

_LITTLE_SPACE = 10 * 2**30
_ANSWER_SECONDS = 60.0
_REQUEUE_SECONDS = 45.0
_LIBRARIES = ("torch", "ray", "numpy")
_PROBE_MODULE = "vaedist.slurm.preflight"


Verdict = Literal["ok", "note", "WRONG"]


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    verdict: Verdict
    text: str


def findings_table(findings: list[Finding]) -> str:
    """The findings as text."""
    width = max(len(finding.what) for finding in findings)
    return "\n".join(
        f"{finding.what.ljust(width)}  {finding.verdict.ljust(5)}  {finding.text}" for finding in findings
    )


def check_site(site: Site, site_file: Path, python_folder: Path | None, wait: float) -> list[Finding]:
    """Everything, in the order in which a person would look.

    Args:
        wait: Seconds that the short job may stay in the queue; 0: no job is submitted.
    """
    version = _answer("sbatch", "--version")
    if version is None:
        return [Finding("Slurm", "WRONG", "there is no sbatch here: run this on a login node")]
    findings = [Finding("Slurm", "ok", version[1].strip()), _partition(site)]
    scratch, finding = _shared_folder(site)
    findings.append(finding)
    if scratch is None:
        return findings
    folder = scratch / f".vaedist-check-{secrets.token_hex(4)}"
    folder.mkdir(mode=0o700)
    try:
        probe = _Probe(site, site_file, python_folder, folder)
        findings.append(probe.test_only())
        if wait and findings[-1].verdict == "ok":
            findings += probe.run(wait)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return findings


# On the login node ------------------------------------------------------------------------------------------


def _partition(site: Site) -> Finding:
    def wrong(text: str) -> Finding:
        return Finding("partition", "WRONG", text)

    shown = _answer("scontrol", "show", "partition", "--oneliner", *filter(None, [site.partition]))
    if shown is None or shown[0] != 0:
        reason = "scontrol does not answer" if shown is None else _last_message(shown[1])
        _, listed = _answer("scontrol", "show", "partition") or (0, "")
        known = sorted(set(re.findall(r"PartitionName=(\S+)", listed)))
        return wrong(f"{site.partition}: {reason}; there are {', '.join(known) or 'none'}")
    lines = [line for line in shown[1].splitlines() if site.partition or " Default=YES" in line]
    if not lines:
        return wrong("this cluster has no default partition: set partition in the site file")
    fields = dict(re.findall(r"(\w+)=(\S+)", lines[0]))
    limit = fields.get("MaxTime", "UNLIMITED")
    name, nodes, cpus = (fields.get(field, "?") for field in ("PartitionName", "TotalNodes", "TotalCPUs"))
    text = f"{name}, {nodes} nodes, {cpus} CPUs, at most {limit}"
    asked = site.time_max or site.time
    with contextlib.suppress(ValueError):  # a limit written in another way: sbatch --test-only will tell
        if asked is not None and limit != "UNLIMITED" and seconds(asked) > seconds(limit):
            return wrong(f"{text}: time and time_max of the site file must not be longer")
    return Finding("partition", "ok" if fields.get("State", "UP") == "UP" else "note", text)


def _shared_folder(site: Site) -> tuple[Path | None, Finding]:
    try:
        folder = Path.cwd() if site.scratch is None else expand(site.scratch, "scratch of the site file")
        free = _free_space(folder)
    except OSError as error:
        return None, Finding("shared folder", "WRONG", f"{folder}: {error.strerror}; set scratch")
    except UserError as error:
        return None, Finding("shared folder", "WRONG", str(error))
    text = f"{folder} is writable, {free / 2**30:.0f} GiB free"
    little = Finding("shared folder", "note", f"{text}: that is little")
    return folder, little if free < _LITTLE_SPACE else Finding("shared folder", "ok", text)


def _free_space(folder: Path) -> int:
    """Bytes free in a folder, which is made if need be and takes a file."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = folder / f".vaedist-{secrets.token_hex(4)}"
    file.touch(mode=0o600)
    file.unlink()
    return shutil.disk_usage(folder).free


# The short job ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Probe:
    """A job as small as a job of this site can be, with a folder of its own."""

    site: Site
    site_file: Path
    python_folder: Path | None
    folder: Path

    def _script(self, gpus: int | None) -> str:
        site = self.site
        files = [str(self.folder / name) for name in ("report.json", "token", "log")]
        spec = BatchSpec(
            "vaedist-check", (tuple(files[:2]),), files[2], module=_PROBE_MODULE, gpus_per_node=gpus
        )
        short = site.time if site.time is not None and seconds(site.time) < 600 else "00:10:00"
        spec = replace(spec, time=short)
        return batch_script("chain", spec, site, self.site_file, self.python_folder)

    def _sbatch(self, option: str, script: str) -> tuple[int, str]:
        path = self.folder / "probe"
        path.write_text(script, encoding="utf-8")
        kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
        environment = environment_without("SBATCH_", "SLURM_", "VAEDIST_", keep=kept)
        return _answer("sbatch", option, str(path), environment=environment) or (1, "no answer")

    def test_only(self) -> Finding:
        try:
            script = self._script(None)
        except UserError as error:
            return Finding("sbatch --test-only", "WRONG", str(error))
        code, text = self._sbatch("--test-only", script)
        return Finding("sbatch --test-only", "WRONG" if code else "ok", _last_message(text))

    def run(self, wait: float) -> list[Finding]:
        """Submit the job, and compare what it sees with what is seen here."""
        gpus = None if self.site.gpu_syntax == "none" else 1
        token = secrets.token_hex(8)
        (self.folder / "token").write_text(token)
        code, text = self._sbatch("--parsable", self._script(gpus))
        if code != 0:
            return [Finding("a job", "WRONG", _last_message(text))]
        number = text.strip().partition(";")[0]
        try:
            report = self._report(number, wait)
            if isinstance(report, Finding):
                return [report]
            requeued = report["requeue"] == "" and _was_requeued(number)
            return _findings_there(self.site, report, token, requeued=requeued)
        finally:
            _answer("scancel", number)

    def _report(self, number: str, wait: float) -> dict[str, Any] | Finding:
        """What the job wrote; a finding where it wrote nothing."""
        path = self.folder / "report.json"
        begun = time.monotonic()
        state = ""
        while time.monotonic() - begun < wait:
            if path.exists():
                content: dict[str, Any] = json.loads(path.read_text())
                return content
            shown = _answer("scontrol", "show", "job", "--oneliner", number)
            state = (re.findall(r"JobState=(\S+)", shown[1]) or [""])[0] if shown else ""
            if state and state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                time.sleep(2)  # a network disk may show the file a little later
                if path.exists():
                    continue
                break
            time.sleep(1)
        else:
            text = f"job {number} has not reported anything after {wait:.0f} s ({state}): cancelled"
            return Finding("a job", "note", text)
        try:
            reason = _last_message((self.folder / "log").read_text(errors="replace"))
        except OSError:
            reason = f"and nothing in {self.folder.parent}: do the compute nodes see this folder?"
        return Finding("a job", "WRONG", f"job {number} ended as {state}: {reason}")


def _was_requeued(number: str) -> bool:
    begun = time.monotonic()
    while time.monotonic() - begun < _REQUEUE_SECONDS:
        shown = slurm_output("scontrol", "show", "job", "--oneliner", number, seconds=_ANSWER_SECONDS)
        if re.search(r"\bRestarts=[1-9]", shown or ""):
            return True
        time.sleep(1)
    return False


def _findings_there(site: Site, report: dict[str, Any], token: str, *, requeued: bool) -> list[Finding]:
    """What the job's report says, beside what is seen here."""
    here = _versions()
    text = f"ran on {report['node']}, {report['cpus']} CPUs, {report['gpus']} GPUs"
    findings = [Finding("a job", "ok", text)]
    same = report["token"] == token
    text = "the same" if same else "not what is here: set scratch"
    findings.append(Finding("shared folder there", "ok" if same else "WRONG", text))
    text = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    if any(here.get(name) != version for name, version in report["versions"].items()):
        findings.append(Finding("versions there", "note", f"{text} (here other: {here})"))
    else:
        findings.append(Finding("versions there", "ok", text))
    if report["node_local"] is not None:
        findings.append(Finding("node-local", *report["node_local"]))
    if site.interface is not None:
        wanted = tuple(re.sub(r"^[=^]+", "", site.interface).split(","))
        there = any(name.startswith(wanted) for name in report["interfaces"])
        ok = there or site.interface.startswith("^")
        text = f"{site.interface}; there are {', '.join(report['interfaces'])}"
        findings.append(Finding("interface", "ok" if ok else "WRONG", text))
    works = {"requeue": requeued, "resubmit": report["resubmit"] == ""}
    text = ", ".join(f"{name} works" if ok else f"{name} does not" for name, ok in works.items())
    reasons = "; ".join(reason for reason in (report["requeue"], report["resubmit"]) if reason)
    text += f" ({reasons})" if reasons else ""
    verdict: Verdict = "ok" if works.get(site.continue_by, True) else "WRONG"
    return [*findings, Finding(f"continue_by: {site.continue_by}", verdict, text)]


# On a compute node ------------------------------------------------------------------------------------------


@cli_command
def main(argv: list[str] | None = None) -> int:
    """What runs in the short job: look around, write the report, and try to be put back into the queue."""
    report, token = (Path(text) for text in (sys.argv[1:] if argv is None else argv))
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        return 0  # this is the proof that requeueing works
    site = load_site(os.environ["VAEDIST_SITE"])
    number = os.environ.get("SLURM_JOB_ID", "")
    shown = _answer("scontrol", "show", "job", number)
    allowed = shown is not None and shown[0] == 0
    if allowed and site.continue_by != "requeue":
        _answer("scontrol", "update", f"jobid={number}", "requeue=1")  # to see whether it would work
    successor = _answer("sbatch", "--test-only", f"--dependency=afterany:{number}", "--time=1", "--wrap=true")
    if successor is None:
        resubmit = "sbatch is not in reach on a compute node"
    else:
        resubmit = _last_message(successor[1]) if successor[0] else ""
    content = {
        "node": node_name() or socket.gethostname(),
        "cpus": os.environ.get("SLURM_CPUS_ON_NODE", "?"),
        "gpus": os.environ.get("SLURM_GPUS_ON_NODE", "0") or "0",
        "token": token.read_text() if token.exists() else None,
        "versions": _versions(),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "node_local": _node_local(site),
        "requeue": "" if allowed else "scontrol is not in reach on a compute node",
        "resubmit": resubmit,
    }
    replace_file(report, as_json(content))
    if allowed:
        _answer("scontrol", "requeue", number)
    return 0


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
        return "ok", f"{folder} is writable, {_free_space(folder) / 2**30:.1f} GiB free"
    except UserError as error:
        return "WRONG", str(error)
    except OSError as error:
        return "WRONG", f"{site.node_local}: {error.strerror}; shards would be read from the shared folder"


# Slurm's answers --------------------------------------------------------------------------------------------


def _answer(*command: str, environment: dict[str, str] | None = None) -> tuple[int, str] | None:
    """Exit code and both outputs; None: there is no such program, or it does not answer."""
    done = slurm_command(*command, seconds=_ANSWER_SECONDS, environment=environment)
    return None if done is None else (done.returncode, done.stdout + done.stderr)


def _last_message(text: str) -> str:
    """The last line that a program of Slurm's printed, without its own name."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^(\w+: )(error: )?", "", lines[-1]) if lines else "no answer"


if __name__ == "__main__":
    raise SystemExit(main())
