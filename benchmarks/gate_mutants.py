"""Mutation test of the gate: ``gate-mutants.json``.

``python -m benchmarks.gate_mutants [MODULE…]``. Every mutant that cosmic-ray's operators make of the modules
that decide is run against the gate's own tests; a mutant that no test notices survives and is listed with
its line. A module-wide row counts all of them.

Starting an interpreter for each mutant would take hours. The tests are collected once, and each mutant gets
a fork: a change inside a function is put in its place there; a change outside of one is imported afresh.
Changes to annotations and docstrings, which are never evaluated, are no mutants.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import importlib.abc
import importlib.util
import os
import resource
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import write_results

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "verdict",
    "policy",
    "policy_fields",
    "policy_integrity",
    "policy_requirements",
    "policy_schema",
    "policy_time",
    "policy_types",
    "policy_waivers",
    "evidence",
)
TESTS = tuple(
    f"tests/unit/test_{name}.py"
    for name in (
        "verdict",
        "policy",
        "policy_integrity",
        "policy_replay",
        "policy_requirements",
        "policy_schema",
        "policy_time",
        "policy_waivers",
    )
)
CPU_S = 60
"""Longest time for one mutant; one that runs longer hangs, which a test notices."""


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        module: full name of the module.
        operator: cosmic-ray's name of the change.
        line: where.
        code: the module's whole source, changed.
    """

    module: str
    operator: str
    line: int
    code: str


@dataclass
class Tally:
    """What became of a module's mutants."""

    mutants: int = 0
    survivors: list[str] = field(default_factory=list)

    def row(self, module: str) -> dict[str, Any]:
        """The figures as a row."""
        return {
            "module": f"{module}.py",
            "mutants": self.mutants,
            "killed": self.mutants - len(self.survivors),
            "survivors": self.survivors,
        }


def mutants_of(name: str) -> Iterator[Mutant]:
    """Every mutant of the module ``defense_core.<name>`` whose meaning differs, each once."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import MutationVisitor
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / "defense_core" / f"{name}.py").read_text("utf-8")
    nodes = list(ast_nodes(get_ast(source)))
    seen = {_meaning(source)}
    for operator in operator_names():
        made = get_operator(operator)
        if list(made.arguments()):  # it changes variables that somebody names; there are none
            continue
        count = sum(len(list(made().mutation_positions(node))) for node in nodes)
        for occurrence in range(count):
            code = MutationVisitor.mutate_code(source, made(), occurrence)
            try:
                meaning = _meaning(code)
            except SyntaxError:  # no program, so no mutant
                continue
            if meaning not in seen:
                seen.add(meaning)
                yield Mutant(f"defense_core.{name}", operator.removeprefix("core/"), _line(source, code), code)


def run(names: Sequence[str]) -> dict[str, Tally]:
    """Test every mutant of the modules ``names``."""
    loop = _Loop(names)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    code = pytest.main([*_OPTIONS, *_TESTS], plugins=[loop])
    if code != 0 or not loop.tallies:
        raise SystemExit(f"the gate's tests fail without any mutant (pytest ended with {code})")
    return loop.tallies


_UNUSED = "capture logging warnings faulthandler unraisableexception threadexception cacheprovider doctest junitxml"
_OPTIONS = [
    *("-qq", "-o", "addopts=--import-mode=importlib"),
    *(word for plugin in _UNUSED.split() for word in ("-p", f"no:{plugin}")),
    *("-k", "not test_the_gate_is_light"),  # it starts an interpreter of its own, which knows no mutant
]
_TESTS = [str(ROOT / name) for name in TESTS]


class _Loop:
    """A pytest plugin that, instead of running the collected tests, runs them once for every mutant."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.tallies: dict[str, Tally] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            return False
        items = _by_duration(session)
        gc.collect()
        gc.freeze()  # so that forks share their memory for as long as they live
        for name in self.names:
            tally = self.tallies[name] = Tally()
            for mutant in mutants_of(name):
                tally.mutants += 1
                killer = _killer(session, items, mutant)
                if killer is None:
                    tally.survivors.append(f"line {mutant.line}: {mutant.operator}")
                elif 0 <= killer < len(items):
                    items.insert(0, items.pop(killer))  # what killed one will kill the next one soon
            print(f"{name}: {tally.mutants - len(tally.survivors)} of {tally.mutants}", file=sys.stderr, flush=True)
            for survivor in tally.survivors:
                print(f"  {survivor}", file=sys.stderr, flush=True)
        return True


def _by_duration(session: pytest.Session) -> list[pytest.Item]:
    """The tests, fastest first; all must pass as they are."""
    import time

    timed: list[tuple[float, int]] = []
    for index, item in enumerate(session.items):
        begun = time.perf_counter()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        timed.append((time.perf_counter() - begun, index))
    if session.testsfailed:
        raise pytest.UsageError("the gate's tests fail without any mutant")
    return [session.items[index] for _, index in sorted(timed)]


def _killer(session: pytest.Session, items: list[pytest.Item], mutant: Mutant) -> int | None:
    """The position of the test that noticed ``mutant``; ``None`` if none did; beyond all: the import did, or time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _silence()
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        found = len(items)
        try:
            found = _first_failure(session, items, mutant)
        finally:
            os.write(writer, str(found).encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    found = int(answer) if answer else len(items)
    return None if found < 0 else found


def _first_failure(session: pytest.Session, items: list[pytest.Item], mutant: Mutant) -> int:
    if not _patch(mutant):
        return _afresh(mutant, len(items))
    for index, item in enumerate(items):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        if session.testsfailed:
            return index
    return -1


def _patch(mutant: Mutant) -> bool:
    """Put the changed functions in the place of the old ones; whether that is all that changed."""
    module = sys.modules[mutant.module]
    original = (ROOT / (mutant.module.replace(".", "/") + ".py")).read_text("utf-8")
    if _meaning(original, bodies=False) != _meaning(mutant.code, bodies=False):
        return False
    changed = types.ModuleType(mutant.module)
    changed.__dict__["__name__"] = mutant.module + "_changed"
    sys.modules[mutant.module + "_changed"] = changed
    exec(compile(mutant.code, mutant.module, "exec"), changed.__dict__)
    new = dict(_functions(vars(changed), changed.__name__))
    for name, function in _functions(vars(module), module.__name__):
        function.__code__ = new[name].__code__
    return True


def _functions(namespace: dict[str, Any], module: str) -> Iterator[tuple[str, types.FunctionType]]:
    for value in list(namespace.values()):
        if isinstance(value, types.FunctionType) and value.__module__ == module:
            yield value.__qualname__, value
        elif isinstance(value, type) and value.__module__ == module:
            for member in vars(value).values():
                function = member.fget if isinstance(member, property) else member
                if isinstance(function, types.FunctionType) and function.__module__ == module:
                    yield function.__qualname__, function


def _afresh(mutant: Mutant, killed: int) -> int:
    """Import the changed module, and all that stands on it, and run the tests from the start."""
    for name in [name for name in sys.modules if name.partition(".")[0] in {"defense_core", "tests"}]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Finder(mutant))
    try:
        importlib.import_module(mutant.module)
    except Exception:  # noqa: BLE001 - whatever a mutant raises: it cannot be imported, so every test notices
        return killed
    return -1 if pytest.main([*_OPTIONS, "-x", *_TESTS]) == 0 else killed


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.mutant.module else None

    def get_source(self, fullname: str) -> str:
        return self.mutant.code


class _Meaning(ast.NodeTransformer):
    """Leaves out what is never evaluated; on request also the bodies of functions."""

    def __init__(self, bodies: bool) -> None:
        self.bodies = bodies

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        if not self.bodies:
            node.body = []
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(0)
        self.generic_visit(node)
        return node


def _meaning(source: str, *, bodies: bool = True) -> str:
    return ast.dump(_Meaning(bodies).visit(ast.parse(source)))


def _line(source: str, code: str) -> int:
    pairs = zip(source.splitlines(), code.splitlines(), strict=False)
    return next((index for index, (old, new) in enumerate(pairs, 1) if old != new), 0)


def _silence() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=list(MODULES), help="modules of defense_core; default: all")
    parser.add_argument("--dry-run", action="store_true", help="write no results file")
    options = parser.parse_args()
    started = datetime.now(UTC)
    tallies = run(options.modules)
    rows = [tally.row(name) for name, tally in tallies.items()]
    total = {key: sum(row[key] for row in rows) for key in ("mutants", "killed")}
    seconds = (datetime.now(UTC) - started).total_seconds()
    print(f"{total['killed']} of {total['mutants']} killed in {seconds:.0f} s", file=sys.stderr)
    if not options.dry_run:
        command = "python -m benchmarks.gate_mutants"
        write_results("gate-mutants", rows, command=command, started=started)


if __name__ == "__main__":
    main()
