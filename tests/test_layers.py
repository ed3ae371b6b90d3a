"""The walls of the house, read from the source: who may import whom, and what no file may do.

Every rule is also shown a file that breaks it, so that a rule which stopped finding anything fails here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vaedist"
FILES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = {"shard", "train", "tune", "evaluate", "sample", "launch", "export", "board"}
LONGEST_FILE = 500  # lines; a file is read in one sitting

# Height of each room; imports run downwards only, and two rooms of one height do not know each other. A folder inside
# a room may be a room of its own (`evaluation.metrics`: training and inference stand on it, evaluation on them).
HEIGHT = {
    "commands": 12,
    "launchers": 11,
    "slurm": 10,
    "slurm.batch_job": 1,  # Slurm's variables and commands alone
    "tuning": 9,
    "evaluation": 8,
    "training": 7,
    "inference": 7,
    "runs": 6,
    "evaluation.metrics": 5,
    "distributed": 4,
    "models": 3,
    "data": 3,
    "nets": 2,
    "cli": 2,
    "config": 1,
    "core": 0,
}

Finding = tuple[int, str]
Rule = Callable[[str, ast.Module], Iterator[Finding]]


def room(module: str) -> str:
    """The room of a module: its folder, the innermost that has a height; or `commands`."""
    parts = module.split(".")[1:]
    if parts and parts[0] in COMMANDS:
        return "commands"
    inner = ".".join(parts[:2])
    return inner if inner in HEIGHT else ".".join(parts[:1])


def imports(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, wherever in the file, relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _dotted(node.func) == "importlib.import_module":
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)
            elif isinstance(first, ast.JoinedStr) and isinstance(first.values[0], ast.Constant):
                yield node.lineno, f"{first.values[0].value}x"  # f"vaedist.models.{kind}"


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def layers(module: str, tree: ast.Module) -> Iterator[Finding]:
    here = room(module)
    if not here:
        return  # vaedist/__init__.py, which imports nothing of ours before it is asked to (checked below)
    for line, name in imports(module, tree):
        if not name.startswith("vaedist."):
            continue
        there = room(name)
        if there == here or there == "__version__":
            continue
        if there not in HEIGHT:
            yield line, f"imports {name}, which is in no room of the house"
        elif HEIGHT[there] >= HEIGHT[here]:
            yield line, f"{here} imports {there} ({name}): imports run downwards only"


def commands(module: str, tree: ast.Module) -> Iterator[Finding]:
    """What two commands share lies below them: the parsers of all in cli/."""
    if room(module) == "commands":
        for line, name in imports(module, tree):
            if room(name) == "commands" and name.split(".")[1] != module.split(".")[1]:
                yield line, f"imports {name}: no command imports another command"


def libraries(module: str, tree: ast.Module) -> Iterator[Finding]:
    homes = {
        "ray": tuple(
            f"vaedist.launchers.ray.{name}"
            for name in ("cluster", "nodes", "internals", "trainer", "train_worker", "tuner", "tune_worker")
        ),
        "submitit": ("vaedist.slurm.submitit_executor", "vaedist.slurm.local_run"),
        "torch.distributed": ("vaedist.distributed.process_group", "vaedist.distributed.rendezvous"),
    }
    for line, name in imports(module, tree):
        for library, home in homes.items():
            if (name == library or name.startswith(library + ".")) and module not in home:
                yield line, f"imports {name}: {library} lives only in {' and '.join(home)}"
    if module not in homes["torch.distributed"]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _dotted(node).startswith("torch.distributed."):
                yield (
                    node.lineno,
                    f"{_dotted(node)}: torch.distributed lives only in {homes['torch.distributed'][0]}",
                )


_OBJECT_COLLECTIVES = {
    f"{verb}_object{tail}"
    for verb in ("gather", "all_gather", "broadcast", "scatter", "send", "recv")
    for tail in ("", "_list")
}


def object_collectives(module: str, tree: ast.Module) -> Iterator[Finding]:
    """They pickle, so a peer's bytes could act; tensors and `broadcast_bytes` cannot."""
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if name in _OBJECT_COLLECTIVES:
            yield node.lineno, f"{name}: no object collective anywhere"


_TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
_TORCH_IN_PLACE = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_"}
_TORCH_LIKE = {"rand_like", "randn_like", "randint_like"}  # they take no generator at all
_NUMPY_ALLOWED = {"Generator", "PCG64", "SeedSequence", "BitGenerator", "Philox"}


def global_generators(module: str, tree: ast.Module) -> Iterator[Finding]:
    """Randomness belongs to the sample. `contract.build` alone borrows torch's generator, inside `fork_rng`."""
    borrowed: set[int] = set()
    for node in ast.walk(tree):
        forks = isinstance(node, ast.With) and any(
            isinstance(item.context_expr, ast.Call)
            and _dotted(item.context_expr.func) == "torch.random.fork_rng"
            for item in node.items
        )
        # Nets and models are constructed inside `contract.build`'s fork_rng.
        constructs = (
            isinstance(node, ast.FunctionDef)
            and node.name == "__init__"
            and module.startswith(("vaedist.nets.", "vaedist.models."))
        )
        if forks or constructs:
            borrowed.update(id(inner) for inner in ast.walk(node))
    for line, name in imports(module, tree):
        if name == "random" or name.startswith("random."):
            yield line, "imports random: it is one global generator"
    for node in ast.walk(tree):
        if id(node) in borrowed:
            continue
        if isinstance(node, ast.Attribute):
            name = _dotted(node)
            head, _, last = name.rpartition(".")
            if head in ("np.random", "numpy.random") and last not in _NUMPY_ALLOWED:
                yield node.lineno, f"{name}: use numpy.random.Generator(PCG64(...))"
            if name in (
                "torch.manual_seed",
                "torch.seed",
                "torch.random.manual_seed",
                "torch.cuda.manual_seed",
            ):
                yield node.lineno, f"{name}: use context.generator(...)"
        if isinstance(node, ast.Call):
            name = _dotted(node.func)
            head, _, last = name.rpartition(".")
            named = {keyword.arg for keyword in node.keywords}
            if head == "torch" and last in _TORCH_LIKE:
                yield node.lineno, f"{name} takes no generator: draw with ctx.noise or ctx.uniform"
            elif head == "torch" and last in _TORCH_DRAWS and "generator" not in named:
                yield node.lineno, f"{name} without generator="
            elif last in _TORCH_IN_PLACE and "generator" not in named:
                yield node.lineno, f".{last} without generator="


def excepts(module: str, tree: ast.Module) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield node.lineno, "bare except"
            elif all(isinstance(statement, ast.Pass) for statement in node.body) and _dotted(node.type) in (
                "Exception",
                "BaseException",
            ):
                yield node.lineno, f"except {_dotted(node.type)}: pass"


def unpickling(module: str, tree: ast.Module) -> Iterator[Finding]:
    """A checkpoint from a stranger may fail, never act."""
    for line, name in imports(module, tree):
        if name.split(".")[0] in ("dill", "shelve", "marshal", "cloudpickle"):
            yield line, f"imports {name}: no unpickling"
        if name.startswith("pickle.") and name != "pickle.UnpicklingError":
            yield line, f"imports {name}: no unpickling"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if _dotted(node.func).startswith("pickle."):
            yield node.lineno, f"{_dotted(node.func)}: no pickling, no unpickling"
        arguments = {keyword.arg: keyword.value for keyword in node.keywords}
        if _dotted(node.func) == "torch.load":
            only = arguments.get("weights_only")
            if not (isinstance(only, ast.Constant) and only.value is True):
                yield node.lineno, "torch.load without weights_only=True"
        allow = arguments.get("allow_pickle")
        if isinstance(allow, ast.Constant) and allow.value is True:
            yield node.lineno, "allow_pickle=True"


RULES: tuple[Rule, ...] = (
    layers,
    commands,
    libraries,
    object_collectives,
    global_generators,
    excepts,
    unpickling,
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Rule) -> None:
    broken = [
        f"{path.relative_to(ROOT)}:{line}: {told}"
        for path in FILES
        for line, told in rule(module_name(path), ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not broken, "\n".join(broken)


BREAKERS: list[tuple[Rule, str, str]] = [
    (layers, "vaedist.models.vae", "from vaedist.data import stream"),
    (layers, "vaedist.data.loading.stream", "import vaedist.models.contract"),
    (layers, "vaedist.evaluation.metrics.image_quality", "from vaedist.training.loop import fit"),
    (layers, "vaedist.nets.bodies", "from vaedist.models import contract"),
    (layers, "vaedist.config.job", "def f():\n    from vaedist.nets.ssim import ssim"),
    (layers, "vaedist.launchers.local", "from ..train import main"),
    (layers, "vaedist.tuning.controller", "from vaedist.launchers.ray.tuner import run"),
    (layers, "vaedist.training.loop", "from vaedist.tuning import space"),
    (commands, "vaedist.launch", "def f():\n    from vaedist import evaluate"),
    (commands, "vaedist.sample", "from vaedist.evaluate import open_data"),
    (libraries, "vaedist.tuning.controller", "from ray import tune"),
    (layers, "vaedist.train", "from vaedist.sample import main\nfrom vaedist.utils import x"),
    (
        layers,
        "vaedist.data.loading.stream",
        "import importlib\nimportlib.import_module(f'vaedist.models.{k}')",
    ),
    (libraries, "vaedist.launchers.local", "def f():\n    import ray.train"),
    (libraries, "vaedist.training.loop", "import torch.distributed as dist"),
    (libraries, "vaedist.training.loop", "import torch\ntorch.distributed.barrier()"),
    (libraries, "vaedist.training.loop", "from torch import distributed"),
    (libraries, "vaedist.slurm.supervisor", "from submitit import AutoExecutor"),
    (object_collectives, "vaedist.distributed.process_group", "dist.all_gather_object(a, b)"),
    (object_collectives, "vaedist.distributed.process_group", "broadcast_object_list([a])"),
    (global_generators, "vaedist.data.loading.stream", "import random"),
    (global_generators, "vaedist.data.loading.stream", "np.random.shuffle(x)"),
    (global_generators, "vaedist.data.loading.stream", "rng = np.random.default_rng"),
    (global_generators, "vaedist.models.vae", "torch.randn(3)"),
    (global_generators, "vaedist.models.vae", "torch.randn_like(x, generator=g)"),
    (global_generators, "vaedist.models.vae", "x.normal_()"),
    (global_generators, "vaedist.training.loop", "torch.manual_seed(0)"),
    (global_generators, "vaedist.training.loop", "class A:\n    def __init__(self):\n        torch.randn(3)"),
    (excepts, "vaedist.train", "try:\n    f()\nexcept:\n    g()"),
    (excepts, "vaedist.train", "try:\n    f()\nexcept Exception:\n    pass"),
    (unpickling, "vaedist.runs.checkpoint", "torch.load(p)"),
    (unpickling, "vaedist.runs.checkpoint", "torch.load(p, weights_only=False)"),
    (unpickling, "vaedist.data.format.index", "np.load(p, allow_pickle=True)"),
    (unpickling, "vaedist.data.format.index", "import pickle\npickle.loads(b)"),
    (unpickling, "vaedist.data.format.index", "from pickle import loads"),
]


@pytest.mark.parametrize(
    ("rule", "module", "source"), BREAKERS, ids=[f"{r.__name__}-{s[:40]}" for r, _, s in BREAKERS]
)
def test_each_rule_finds_its_breaker(rule: Rule, module: str, source: str) -> None:
    assert list(rule(module, ast.parse(source)))


def test_what_is_allowed_is_not_found() -> None:
    allowed = {
        "vaedist.training.loop": "from vaedist.runs import checkpoint\nfrom vaedist.models.contract import build",
        "vaedist.distributed.process_group": "import torch.distributed as dist\ndist.all_reduce(x)",
        "vaedist.launchers.ray.tuner": "from ray import tune\nfrom vaedist.tuning.controller import SearchController",
        "vaedist.tuning.measure": "from vaedist.runs.open_run import open_run\nfrom vaedist.evaluation import kid",
        "vaedist.launchers.ray.trainer": "import ray.train\nfrom vaedist.training.loop import fit",
        "vaedist.models.contract": "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(seed)",
        "vaedist.nets.bodies": "class A:\n    def __init__(self):\n        self.x = torch.randn(3)",
        "vaedist.data.loading.stream": "g = np.random.Generator(np.random.PCG64(1))\ntorch.rand(3, generator=g)",
        "vaedist.runs.checkpoint": "import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    g()",
        "vaedist.shard": "from vaedist import __version__\nfrom vaedist.data.packing import pack",
    }
    for module, source in allowed.items():
        assert [found for rule in RULES for found in rule(module, ast.parse(source))] == [], module


def test_files_are_short_enough_to_read() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_no_drawer_for_everything() -> None:
    assert [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")] == []


def test_importing_the_package_imports_nothing() -> None:
    """What a function of it imports is imported when it is called."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {name.partition(".")[0] for _, name in imports("vaedist", tree)} == {"__future__", "typing"}


def test_no_path_of_one_machine() -> None:
    """Nothing committed names a package index or a folder of the machine it was written on."""
    suffixes = {".py", ".yaml", ".sh", ".md", ".toml", ".txt", ""}
    told = []
    folders = [ROOT / name for name in ("vaedist", "jobs", "tests", "tools", ".ci", "cluster")]
    for path in [*ROOT.iterdir(), *(inner for folder in folders for inner in folder.rglob("*"))]:
        if not path.is_file() or path.suffix not in suffixes or path.name in ("LICENSE", ".git"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        told += [
            f"{path.relative_to(ROOT)}: {word}" for word in ("/" + "work/", "index" + "-url") if word in text
        ]
    assert told == []
