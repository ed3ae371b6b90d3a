"""Batch scripts: the templates of `cluster/`, filled in.

The templates are scripts that `sbatch` takes as they are. Filling one in changes three places and leaves the rest:
its `#SBATCH` lines (those of the site and of the job replace or follow the template's), what stands between
`# >>> environment` and `# <<<` (modules, the site's lines of shell, variables), and between `# >>> arguments` and
`# <<<` (what the supervisor is to run; for a job array one line per task).

Every value is quoted for the shell. sbatch reads the quotes of a `#SBATCH` line much as a shell does (quotes and
backslashes; `#` begins a comment), so the same quoting serves both. A line break cannot be quoted there and is refused
wherever a value comes in (`vaedist.config.site.check_text`).

In a container the supervisor cannot reach `scontrol`, so there the script itself waits for it and requeues the job.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import vaedist
from vaedist.config.settings import expand
from vaedist.config.site import Site, check_text, seconds
from vaedist.core.errors import EXIT_STOPPED, UserError

TEMPLATES = ("train", "array", "chain", "tune")
SUPERVISOR = "vaedist.slurm.supervisor"
LAST_LINE = f'exec python -m {SUPERVISOR} "$@"'
"""The last line of every template."""

_REGION = r"(?ms)^# >>> {name}.*?^# <<<\n"


@dataclass(frozen=True)
class BatchSpec:
    """One call of sbatch: what it runs, and what it asks for beyond the site's own options.

    Attributes:
        name: Of the job in the queue.
        tasks: For each task of the job array the command and its arguments; one: no array.
        log: File for what the tasks print; of an array one each, `%a` in it.
        comment: The job's comment in Slurm, by which its successors are found; "": none.
        nodes: How many.
        ranks_per_node: Processes that train together on each node; None: the allocation decides.
        gpus_per_node: Where the site has any; None: all that the site names.
        engine: What starts the ranks; None: what the site says.
        time: Wall time, HH:MM:SS; None: the site's, else the template's.
        max_parallel: Most tasks of the array at a time; None: no limit.
        module: What runs in the job, with `tasks` as its arguments.
    """

    name: str
    tasks: tuple[tuple[str, ...], ...]
    log: str
    comment: str = ""
    nodes: int = 1
    ranks_per_node: int | None = None
    gpus_per_node: int | None = None
    engine: str | None = None
    time: str | None = None
    max_parallel: int | None = None
    module: str = SUPERVISOR


def cluster_folder() -> Path:
    """Where templates and site files are: in the installed package, or beside it in the source tree."""
    inside = Path(vaedist.__file__).parent / "cluster"
    return inside if inside.is_dir() else Path(vaedist.__file__).parents[1] / "cluster"


def batch_script(
    template: str, spec: BatchSpec, site: Site, site_file: Path, python_folder: Path | None
) -> str:
    """The script that sbatch gets.

    Args:
        template: One of `TEMPLATES`.
        site_file: What the supervisor reads the site from, as `$VAEDIST_SITE`.
        python_folder: Put first in PATH where the site says nothing about Python; None: left alone.

    Raises:
        UserError: a value cannot stand in a batch script, or the site does not take the job.
    """
    values = [("an argument", argument) for task in spec.tasks for argument in task]
    values += [("the name", spec.name), ("the log", spec.log), ("the site file", str(site_file))]
    try:
        for what, value in values:
            check_text(value, what)
    except ValueError as error:
        raise UserError(str(error)) from None
    if site.container is not None and spec.nodes > 1:
        raise UserError(
            f"site {site.name} runs Python in a container, where srun is out of reach, so --nodes {spec.nodes} cannot "
            "work: use one node, or a site file without container"
        )
    text = (cluster_folder() / f"{template}.sbatch").read_text(encoding="utf-8")
    filled = _with_options(text, sbatch_options(spec, site))
    filled = _with_region(filled, "environment", environment_lines(site, site_file, python_folder))
    filled = _with_region(filled, "arguments", argument_lines(spec))
    assert filled.endswith(f"{LAST_LINE}\n"), "every template ends in the supervisor"
    if site.container is None:
        last = [LAST_LINE.replace(SUPERVISOR, spec.module)]
    else:
        # Home, /tmp and the current folder are in the container by themselves.
        scratch = [expand(site.scratch, "scratch of the site file")] if site.scratch else []
        last = container_lines(site, [site_file.parent, *scratch], spec.module)
    return filled.removesuffix(f"{LAST_LINE}\n") + "\n".join(last) + "\n"


def sbatch_options(spec: BatchSpec, site: Site) -> list[tuple[str, str]]:
    """Names and values for `#SBATCH`, in the order in which they are written."""
    wanted = [("job-name", spec.name), ("nodes", str(spec.nodes))]
    gpus = site.gpus_per_node if spec.gpus_per_node is None else spec.gpus_per_node
    per_node = spec.ranks_per_node or (gpus if site.gpu_syntax != "none" else None)
    if per_node is not None:
        wanted.append(("ntasks-per-node", str(per_node)))
    if site.gpus_per_node is not None and gpus is not None and gpus != site.gpus_per_node:
        site = site.model_copy(update={"gpus_per_node": gpus})
    wanted += site.options(time=spec.time)
    if len(spec.tasks) > 1:
        limit = "" if spec.max_parallel is None else f"%{spec.max_parallel}"
        wanted.append(("array", f"0-{len(spec.tasks) - 1}{limit}"))
    wanted.append(("output", spec.log))
    if spec.comment:
        wanted.append(("comment", spec.comment))
    # Where Slurm itself puts a preempted job back into the queue, a successor would be one too many.
    wanted.append(("requeue", "") if site.continue_by == "requeue" else ("no-requeue", ""))
    return wanted


def environment_lines(site: Site, site_file: Path, python_folder: Path | None) -> list[str]:
    """Shell lines that make a job's environment what the site file says."""
    lines = [f"export VAEDIST_SITE={shlex.quote(str(site_file))}", *setup_lines(site)]
    if python_folder is not None and not site.setup and site.container is None:
        lines.append(f"export PATH={shlex.quote(str(python_folder))}:$PATH")
    return lines


def setup_lines(site: Site) -> list[str]:
    """Shell lines for the site's modules, its own lines, and its variables."""
    lines = []
    if site.modules:
        # A batch shell is no login shell: where the function did not come along, the system's profile has it.
        lines.append("type module >/dev/null 2>&1 || source /etc/profile || true")
        lines.append(f"module load {shlex.join(site.modules)}")
    lines += site.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.variables.items()]
    if site.group is not None:
        lines.append(f"export VAEDIST_GROUP={shlex.quote(site.group)}")
    return lines


_VARIABLES = {"mem": "MEM_PER_NODE"}
_AS_NAMED = frozenset(
    """
    account acctg-freq clusters constraint cpus-per-gpu distribution exclusive export gpu-bind gpu-freq gpus
    gpus-per-node gpus-per-task gres gres-flags mem-bind mem-per-cpu mem-per-gpu network overcommit partition profile
    qos reservation spread-job threads-per-core wckey
    """.split()
)
_LONGEST_TIME = "04:00:00"
"""What the longest of the scripts in `jobs/` and `cluster/` asks for."""


def environment_exports(site: Site, site_file: Path) -> tuple[list[str], str]:
    """Shell lines that tell plain sbatch what the site wants, and the options that it has no variable for.

    A variable of sbatch wins over the `#SBATCH` lines of a script, so the site's default time is not among them: each
    script states its own. Only where the site takes no job of that length is the limit set.
    """
    lines = [f"export VAEDIST_SITE={shlex.quote(str(site_file))}"]
    setup = "\n".join(setup_lines(site))
    lines.append(f"export VAEDIST_SETUP={shlex.quote(setup)}")
    without_variable = []
    for name, value in site.options():
        if name == "time":
            continue
        if name in _VARIABLES or name in _AS_NAMED:
            variable = _VARIABLES.get(name, name.upper().replace("-", "_"))
            lines.append(f"export SBATCH_{variable}={shlex.quote(value or '1')}")
        else:
            without_variable.append(f"--{name}" + (f"={shlex.quote(value)}" if value else ""))
    if site.time_max is not None and seconds(site.time_max) < seconds(_LONGEST_TIME):
        lines.append(f"export SBATCH_TIMELIMIT={site.time_max}")
    if site.continue_by != "requeue":
        lines.append("export SBATCH_NO_REQUEUE=1")
    return lines, " ".join(without_variable)


def argument_lines(spec: BatchSpec) -> list[str]:
    """Shell lines that set `$@` to what the supervisor is to run."""
    before: list[str] = []
    if spec.engine is not None:
        before += ["--engine", spec.engine]
    if spec.ranks_per_node is not None:
        before += ["--ranks-per-node", str(spec.ranks_per_node)]
    lines = [f"set -- {shlex.join([*before, *task])}" for task in spec.tasks]
    if len(lines) == 1:
        return lines
    return [
        'case "$SLURM_ARRAY_TASK_ID" in',
        *(f"{number}) {line} ;;" for number, line in enumerate(lines)),
        '*) echo "there is no task $SLURM_ARRAY_TASK_ID in this array" >&2; exit 2 ;;',
        "esac",
    ]


def container_lines(site: Site, folders: Sequence[Path], module: str) -> list[str]:
    """The end of a script whose Python runs in an Apptainer image: run, pass the signal on, requeue from here.

    Raises:
        UserError: a folder that must be in the container has a name that Apptainer takes for several.
    """
    assert site.container is not None
    binds = []
    for folder in folders:
        if re.search(r"[,:]", str(folder)):
            hint = "choose a folder without , and :"
            raise UserError(f"Apptainer cannot take {folder} into a container: {hint}")
        binds += ["--bind", str(folder)]
    gpu = [] if site.gpu_syntax == "none" else ["--nv"]
    inside = ["apptainer", "exec", *gpu, *binds, site.container, "python", "-m", module]
    if module == SUPERVISOR:
        inside += ["--continue-by", "none"]
    lines = [
        "# In the container there is no scontrol: it only runs, and this shell requeues the job.",
        f'{shlex.join(inside)} "$@" &',
        "supervisor=$!",
        "trap 'kill -USR1 \"$supervisor\"' USR1",
        "trap 'kill -TERM \"$supervisor\"' TERM",
        'wait "$supervisor" || true',
        'while kill -0 "$supervisor" 2>/dev/null; do # a signal ended the wait, not the supervisor',
        '    wait "$supervisor" || true',
        "done",
        "code=0",
        'wait "$supervisor" || code=$?',
    ]
    if site.continue_by == "requeue":
        lines += [
            f'if [ "$code" = {EXIT_STOPPED} ] && [ -n "${{SLURM_JOB_ID:-}}" ]; then',
            f'    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {site.max_restarts} ]; then',
            '        exec scontrol requeue "$SLURM_JOB_ID"',
            "    fi",
            f'    echo "not continued: this job has been started again {site.max_restarts} times (max_restarts)" >&2',
            "fi",
        ]
    return [*lines, 'exit "$code"']


def _with_options(text: str, wanted: Sequence[tuple[str, str]]) -> str:
    """`text` with these `#SBATCH` options in place of its own of the same name, in one block."""
    names = {name for name, _ in wanted} | {"requeue"}
    lines = text.splitlines()
    own = [line for line in lines if line.startswith("#SBATCH --")]
    kept = [line for line in own if re.split("[= ]", line.removeprefix("#SBATCH --"))[0] not in names]
    first = lines.index(own[0])
    rest = [line for line in lines[first:] if line not in own]
    block = [_directive(name, value) for name, value in wanted]
    return "\n".join([*lines[:first], *block, *kept, *rest]) + "\n"


def _directive(name: str, value: str) -> str:
    if "\\" in value:  # sbatch drops it, quoted or not
        raise UserError(f"--{name}={value}: sbatch takes no backslash in an option: choose another value")
    return f"#SBATCH --{name}" + (f"={shlex.quote(value)}" if value else "")


def _with_region(text: str, name: str, lines: Sequence[str]) -> str:
    content = "".join(f"{line}\n" for line in lines)
    filled, count = re.subn(_REGION.format(name=name), lambda _: content, text, count=1)
    assert count == 1, f"every template has a place for its {name}"
    return filled
