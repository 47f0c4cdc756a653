"""Checks that a tuned model goes through what torch does with models."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import torch
from torch import nn

from gift_core.testing.results import CheckSkipped, demand
from gift_core.testing.subject import Subject, distance, move, tolerance, trainable
from gift_core.testing.table import check


@check("torch")
def deep_copies(subject: Subject) -> None:
    """A deep copy gives the same answer from parameters of its own: what moves in one does not move in the other."""
    model = subject.moved()
    wanted = subject.answer(model)
    copied = copy.deepcopy(model)
    demand(torch.equal(subject.answer(copied), wanted), "a deep copy gives another answer")
    mine, its = ({id(p) for p in one.parameters()} for one in (model, copied))
    demand(mine.isdisjoint(its), "a deep copy shares parameters with its original")
    move(copied, by=1.0)
    demand(torch.equal(subject.answer(model), wanted), "when a deep copy trains, its original moves")
    demand(not torch.equal(subject.answer(copied), wanted), "when a deep copy trains, its own answer stays: it reads the original")


@check("torch")
def pickles(subject: Subject) -> None:
    """``pickle`` and ``torch.save`` give a model back that answers the same and trains the same parameters."""
    try:
        pickle.dumps(subject.plain())
    except Exception as error:
        raise CheckSkipped(f"the plain model cannot be pickled ({str(error).splitlines()[0]})") from error
    model = subject.moved()
    wanted, names = subject.answer(model), [name for name, _ in trainable(model)]
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for way, again in (("pickle", pickle.loads(pickle.dumps(model))), ("torch.save", torch.load(saved, weights_only=False))):
        demand(torch.equal(subject.answer(again), wanted), f"a model that went through {way} gives another answer")
        demand([name for name, _ in trainable(again)] == names, f"a model that went through {way} trains other parameters")


@check("torch")
def compiles(subject: Subject) -> None:
    """``torch.compile(fullgraph=True)`` traces the tuned model into one graph with the same answer, backend "eager"."""
    if not subject.model.compilable:
        raise CheckSkipped("torch does not trace the plain model into one graph")
    model = subject.moved()
    wanted = subject.answer(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    try:
        off = distance(wanted, subject.answer(compiled))  # type: ignore[arg-type]
    finally:
        torch.compiler.reset()
    demand(off <= tolerance(subject.dtype), f"the compiled model's answer is off by {off:.2g}")


@check("torch")
def exports(subject: Subject) -> None:
    """``torch.export`` gives a program with the same answer."""
    model = subject.moved()
    wanted = subject.answer(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of recurrent layers and of what it deprecates
        program = torch.export.export(model, (subject.model.example(subject.dtype),), strict=False)
    exported: nn.Module = program.module()
    off = distance(wanted, subject.answer(exported))
    demand(off <= tolerance(subject.dtype), f"the exported program's answer is off by {off:.2g}")
