"""Bounds of the source: lengths, parameters, names that exist twice, retired words, code lines of the package.

Each rule is a function from a file's tree to what is wrong in it, and is also shown a file that breaks it.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.test_layers import COMMANDS, FILES, PACKAGE, ROOT, Finding

LONGEST_FILE = 400
"""Lines; a file is read in one sitting."""
LONGEST_FUNCTION = 80
MOST_PARAMETERS = 8
"""Of one signature, without self and cls; more go into a frozen config. The public Python API is exempt."""
MOST_CODE_LINES = 22_450
"""Of the package, without docstrings, comments and blank lines. The goal is 22,000: this number only ever falls."""
PLUG_INS = ("vaedist/models/", "vaedist/nets/", "vaedist/data/sources/")
"""Folders where a file's name is a kind's: a kind may share its net's name."""
OUR_WORDS = {"Config", "Model"}
"""Classes that every variant has."""

RETIRED = {
    "told": "message",
    "tell": "echo",
    "teller": "echo",
    "hear": "on_message",
    "door": "command",
    "doors": "commands",
    "strangers": "foreign",
    "rivals": "adversarial_terms",
    "twins": "duplicates",
    "strike": "remove_samples",
    "examine": "evaluate",
    "Wanted": "EvaluationConfig",
    "Findings": "EvaluationResult",
    "Hearts": "HeartbeatMonitor",
    "Beginning": "Initialization",
    "hand_over": "load_optimizers",
    "awaited": "wait_for_file",
    "Swept": "CleanupReport",
    "KNOBS": "RAY_ENV",
    "WITHOUT": "PRIVATE_RAY_ENV",
    "Want": "ResourceRequest",
    "Pulse": "StallMonitor",
    "Sweep": "SearchController",
    "refuse_strangers": "check_is_run_folder",
    "sweep_here": "clean_this_node",
    "Bars": "ProgressBars",
    "risen": "progress",
    "goes_on": "should_continue",
}
"""Identifiers of the earlier dialect, whole, and the field's term; docs/renamed.md has all of them."""
RETIRED_IN_MESSAGES = re.compile(r"\b(doors?|strangers?|rivals?|twins?|tellers?|knobs?)\b", re.IGNORECASE)


def code_lines(source: str) -> int:
    """Lines with code on them."""
    documentation = {
        line
        for statement in ast.walk(ast.parse(source))
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
        for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
    }
    nothing = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in nothing
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(code - documentation)


def length(tree: ast.Module, source: str) -> Iterator[Finding]:
    lines = len(source.splitlines())
    if lines > LONGEST_FILE:
        yield 1, f"{lines} lines, {LONGEST_FILE} at most"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                yield node.lineno, f"{node.name} has {lines} lines, {LONGEST_FUNCTION} at most"


def parameters(tree: ast.Module, source: str) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in named)
            if count > MOST_PARAMETERS:
                yield node.lineno, f"{node.name} has {count} parameters, {MOST_PARAMETERS} at most"


def retired_words(tree: ast.Module, source: str) -> Iterator[Finding]:
    """Whole identifiers, and words of messages; docstrings are read by people."""
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        position_in_file = (before, token.string) == (".", "tell")
        if token.type == tokenize.NAME and token.string in RETIRED and not position_in_file:
            yield token.start[0], f"{token.string} is retired: {RETIRED[token.string]}"
        before = token.string
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and id(node) not in docstrings else None
        if isinstance(text, str) and (found := RETIRED_IN_MESSAGES.search(text)):
            yield node.lineno, f"the message says {found.group()!r}, a retired word"


def twice(names: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names that more than one file has."""
    where: dict[str, list[str]] = defaultdict(list)
    for name, path in names:
        where[name].append(path)
    return {name: paths for name, paths in where.items() if len(paths) > 1}


def classes_of(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from (node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


RULES = (length, parameters, retired_words)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_its_bounds(rule) -> None:  # type: ignore[no-untyped-def]
    broken = []
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        broken += [
            f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in rule(ast.parse(source), source)
        ]
    assert not broken, "\n".join(broken)


BREAKERS = [
    (length, "x = 1\n" * (LONGEST_FILE + 1)),
    (length, "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION),
    (parameters, f"def f({', '.join(f'a{n}' for n in range(MOST_PARAMETERS))}, *, last): ..."),
    (retired_words, "def tell(text): ..."),
    (retired_words, "raise ValueError('this door is shut')"),
]


@pytest.mark.parametrize(("rule", "source"), BREAKERS, ids=[f"{r.__name__}-{s[:30]}" for r, s in BREAKERS])
def test_each_rule_finds_its_breaker(rule, source: str) -> None:  # type: ignore[no-untyped-def]
    assert list(rule(ast.parse(source), source))


def test_what_is_allowed_is_not_found() -> None:
    signature = "def retold(self, a, b, c, d, e, f, g, file):"
    source = f'"""What is told at a door."""\n{signature}\n    return file.tell(), "outdoors"\n'
    assert [found for rule in RULES for found in rule(ast.parse(source), source)] == []
    assert code_lines('"""Theory.\n\nMore."""\n# why\nx = (\n    1\n)\n\ny: int\n"""Of y."""\n') == 4


def test_no_class_exists_twice() -> None:
    names = [(name, str(path.relative_to(ROOT))) for path in FILES for name in classes_of(path)]
    assert twice(pair for pair in names if pair[0] not in OUR_WORDS) == {}
    assert twice([("A", "x.py"), ("A", "y.py"), ("B", "x.py")]) == {"A": ["x.py", "y.py"]}


def test_no_module_exists_twice() -> None:
    paths = [path for path in FILES if path.stem != "__init__"]
    commands = {PACKAGE / f"{name}.py" for name in COMMANDS}
    names = [(path.stem, str(path.relative_to(ROOT))) for path in paths if path not in commands]
    found = twice(names)
    kinds = {name for name, where in found.items() if all(path.startswith(PLUG_INS) for path in where)}
    assert {name: where for name, where in found.items() if name not in kinds} == {}


def test_the_package_is_small_enough() -> None:
    assert sum(code_lines(path.read_text(encoding="utf-8")) for path in FILES) <= MOST_CODE_LINES
