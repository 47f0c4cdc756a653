"""Mutants: programs that differ from a module of ours in one small thing, made by cosmic-ray's operators, and a sample of them.

A place is where an operator finds something to change: a comparison is one place, whichever of seven others may take its place. Places
are drawn, then one change for each, so that what can be changed in many ways does not count many times. The draw follows from the seed
and from what the place is, not from its line: an edit elsewhere leaves the sample as it was.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import math
import re
import warnings
from collections.abc import Iterator

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

#: A type alias by its name, as in ``World = tuple[int, str]``.
_ALIAS = re.compile(r"[A-Z][a-z]\w*")
#: How much of a line is shown on each side of a change.
_AROUND = 24


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a kind of change can be made.

    Attributes:
        function: the dotted name of the function or class around it; empty at the top of the module.
        kind: the family of operators.
        line: the text of its line.
        number: how many equal ones stand before it.
        ways: the changes, each an operator's name and cosmic-ray's number of the occurrence.
    """

    function: str
    kind: str
    line: str
    number: int
    ways: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A module with one change: where it is, what it was, what it is now, and the whole text."""

    module: str
    function: str
    operator: str
    before: str
    after: str
    source: str


def sample(module: str, source: str, seed: int, share: int, least: int) -> list[Mutant]:
    """One in ``share`` of a module's places, at least ``least``, each with a change that has a meaning.

    What has none is passed over and replaced by the next: see `meaning`.
    """
    found = places(source)
    drawn = sorted(found, key=lambda place: _lot(seed, module, place.function, place.kind, place.line, place.number))
    mutants = (mutant for place in drawn if (mutant := _mutant_at(place, module, source, seed)) is not None)
    return list(itertools.islice(mutants, max(least, math.ceil(len(found) / share))))


def places(source: str) -> list[Place]:
    """Every place of a module that one of cosmic-ray's operators changes; those that need arguments are left out."""
    lines = source.splitlines()
    nodes = list(ast_nodes(get_ast(source)))
    ways: dict[tuple[str, str, str, object], list[tuple[str, int]]] = {}
    for name in operator_names():
        if get_operator(name).arguments():
            continue
        operator = get_operator(name)()
        positions = ((node, start) for node in nodes for start, _ in operator.mutation_positions(node))
        for occurrence, (node, start) in enumerate(positions):
            kind = name.rpartition("/")[2].partition("_")[0]
            ways.setdefault((_function_around(node), kind, lines[start[0] - 1].strip(), start), []).append((name, occurrence))
    seen: dict[tuple[str, str, str], int] = {}
    found = []
    for (function, kind, line, _), changes in sorted(ways.items(), key=lambda item: (item[0][3], item[0][1])):
        number = seen[function, kind, line] = seen.get((function, kind, line), -1) + 1
        found.append(Place(function, kind, line, number, tuple(changes)))
    return found


def meaning(source: str) -> str | None:
    """What a program says to the machine; None if it is none, or one that the compiler warns of.

    Left out is what no test could notice: annotations, names for types, what only a type checker reads, and ``strict`` of ``zip``,
    which asserts of our own lists that they are of one length; and what a raised message shows inside its text, for people.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            tree = ast.parse(source)
            compile(tree, "mutant", "exec")
        except (SyntaxError, SyntaxWarning, ValueError):
            return None
    return ast.dump(_Meaning().visit(tree))


class _Meaning(ast.NodeTransformer):
    """Takes out what has no meaning for the machine."""

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if isinstance(node.targets[0], ast.Name) and _ALIAS.fullmatch(node.targets[0].id):
            node.value = ast.Constant(None)
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "zip":
            node.keywords = []
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return self.generic_visit(_Plain().visit(node))


class _Plain(ast.NodeTransformer):
    """Takes the values out of texts."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("")


def _mutant_at(place: Place, module: str, source: str, seed: int) -> Mutant | None:
    same = meaning(source)
    for name, occurrence in sorted(
        place.ways, key=lambda way: _lot(seed, module, place.function, place.line, place.number, way[0], way[1])
    ):
        try:
            mutated = mutate_code(source, get_operator(name)(), occurrence)
        except AttributeError:
            return None  # cosmic-ray cannot replace a dotted name after `except`
        said = meaning(mutated)
        if said == same:
            return None
        if said is not None:
            before, after = change(source, mutated)
            return Mutant(module, place.function, name.rpartition("/")[2], before, after, mutated)
    return None


def change(source: str, mutated: str) -> tuple[str, str]:
    """The part of two texts that differs, with a little of the line around it."""
    start = next((at for at, (a, b) in enumerate(zip(source, mutated, strict=False)) if a != b), min(len(source), len(mutated)))
    end = 0
    while end < min(len(source), len(mutated)) - start and source[-1 - end] == mutated[-1 - end]:
        end += 1
    return _shown(source, start, len(source) - end), _shown(mutated, start, len(mutated) - end)


def _shown(text: str, start: int, end: int) -> str:
    """A stretch of a text with whole words of its line around it."""
    before, after = text[:start].rpartition("\n")[2], text[end:].partition("\n")[0]
    if len(before) > _AROUND:
        before = "… " + (before[-_AROUND:].partition(" ")[2].lstrip() or before[-_AROUND:])
    if len(after) > _AROUND:
        after = (after[:_AROUND].rpartition(" ")[0] or after[:_AROUND]) + " …"
    return (before + text[start:end] + after).strip()


def _function_around(node: parso.tree.NodeOrLeaf) -> str:
    return ".".join(reversed(list(_names_around(node))))


def _names_around(node: parso.tree.NodeOrLeaf) -> Iterator[str]:
    holder = node.parent
    while holder is not None:
        if holder.type in ("funcdef", "classdef"):
            yield holder.name.value
        holder = holder.parent


def _lot(seed: int, *what: object) -> bytes:
    return hashlib.sha256(repr((seed, *what)).encode()).digest()
