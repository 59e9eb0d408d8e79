"""What is live in HBM while a block runs: every array from the op that makes it to its last reader.

A `Trace` is made once for a kind of mesh, a remat policy and an implementation: at which moment of
the backward pass each array appears and is last read. Sizes come later, as numbers or arrays of one
entry a plan, so that the peak of many plans is a product of matrices: moments x arrays x plans.

Elementwise ops work in place, additions of gradients too. What a matmul sums over devices is whole
until it is scattered; what is gathered stays whole from its first reader to its last. What an
implementation does beyond that are its `Passes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from shardsim.graph.derive import Derived, Step
from shardsim.graph.place import (
    CONTEXT,
    EMBED_SHARDED,
    SEQUENCE_SHARDED,
    Kind,
)
from shardsim.model import Model
from shardsim.ops.activate import GATE
from shardsim.ops.rotate import ROTATE
from shardsim.program.blocks import backward_of, derived_blocks, first_as_large, graph
from shardsim.program.holds import Passes
from shardsim.program.sized import by_place, stored, width_of
from shardsim.program.trace import Live, Size, Trace
from shardsim.program.tracer import Tracer

GATHERED = ("fsdp", "expert", *CONTEXT)  # axes whose shards of a weight are gathered before use
RINGS = {SEQUENCE_SHARDED: "sequence", EMBED_SHARDED: "embed"}


@dataclass(frozen=True)
class Mode:
    """How a plan wants matmuls and gathers to run."""

    ring: str = ""  # over "embed" or "sequence", or none
    rows: bool = False  # whether pieces of the sequence lie by rows: no second tensor axis is there
    prefetch: bool = True  # whether gathers of weights may overlap
    quiet: bool = False  # whether layers gather and sum nothing else
    scores_lead: bool = False  # whether scores are much larger than a hidden layer
    waits: bool = False  # whether permutes wait


@dataclass(frozen=True)
class Ends:
    """The head's moments, and what of it is there while layers run."""

    trace: Trace
    late: tuple[Live, ...]  # what its gradients of weights multiply
    whole: tuple[Live, ...] = ()  # the gradients of its matrices, before they are scattered
    sums: tuple[tuple[Size, frozenset[str]], ...] = ()  # what is summed over which axes, forward


def layer_trace(
    model: Model,
    attention: str,
    layer: int,
    kind: Kind,
    kept: frozenset[str],
    passes: Passes,
    mode: Mode,
) -> Trace:
    """Return what is live while a layer of a kind runs again and back, with `kept` kept."""
    layer = first_as_large(model, attention, layer)
    again = backward_of(model, attention, layer, kept).again
    first = (mode.prefetch or passes.mlp_again_first) and mode.quiet and model.parallel_block
    first = first and (attention == "unfused" or model.activation != "relu")
    first = first and passes.attends_first
    waits = passes.mlp_waits and not model.parallel_block
    passes = replace(
        passes,
        attends_first=first,
        mlp_again_first=first
        and passes.mlp_again_first
        and not (mode.prefetch or mode.scores_lead),
        mlp_waits=waits,
        mlp_waits_for_kernels=waits
        and not model.attends
        and _kernels(model, attention, layer) == 1,
        hidden_waits=waits and mode.prefetch,
        places_last=passes.places_last and mode.waits and mode.rows,
    )
    made = not mode.prefetch or model.round_layers > 1  # they are made where they are filled
    if made or not (mode.ring or _passes_round(model, attention, layer, kind)):
        passes = replace(passes, ring_empty="")
    walk = _Walk(model, attention, layer, kind, again, passes, mode.ring, mode.rows)
    return _traced(walk, passes.gathers_ahead if mode.prefetch else 0, mode.prefetch)


class _Walk(NamedTuple):
    """What a walk through a layer depends on: policies and modes that share it have one trace."""

    model: Model
    attention: str
    layer: int
    kind: Kind
    again: tuple[int, ...]
    passes: Passes
    ring: str
    rows: bool


@lru_cache(maxsize=4096)
def _traced(walk: _Walk, ahead: int, carried: bool) -> Trace:
    return _followed(walk).trace(ahead, carried)


@lru_cache(maxsize=1024)
def _passes_round(model: Model, attention: str, layer: int, kind: Kind) -> bool:
    """Return whether something passes round a layer's ops."""
    return any(
        step.op.passed for step in derived_blocks(model, attention, kind).layers[layer].steps
    )


@lru_cache(maxsize=1024)
def _kernels(model: Model, attention: str, layer: int) -> int:
    """Return how many kernels of attention a layer has."""
    ops = graph(model, attention).layers[layer][0].part.ops
    return sum(op.kernel is not None and op.kernel.mask is not None for op in ops)


@lru_cache(maxsize=4096)
def _followed(walk: _Walk) -> Tracer:
    """Return the tracer of a layer."""
    model, passes, ring = walk.model, walk.passes, walk.ring
    derived = derived_blocks(model, walk.attention, walk.kind).layers[walk.layer]
    signs = passes.weights_first and model.activation == "relu"
    last = passes.head_last if passes.head_last == "all" else ""
    biased = model.biases.mlp
    every = passes.ring_empty == "every" and (walk.rows or not biased)
    copies = 0.0 if every else passes.ring_copies  # they are made in what `empties` notes
    early = every and walk.rows
    # Of a gated MLP behind attention the ring that makes its gradient is over before those begin
    # that make both projections again (llama2-7b with axes of 4, 8 and 16, llama2-70b, llama3-70b).
    gated = model.gated_mlp and not model.parallel_block
    after = ring == "embed" and gated
    passes = replace(
        passes,
        head_last=last,
        ring_copies=copies,
        ring_empty=passes.ring_empty and ("every" if every else "few"),
        hidden_first=passes.hidden_first and not model.parallel_block and not ring,
        ring_waits=passes.ring_waits and not after,
        whole_copies=passes.whole_copies and (passes.gated_copies or not gated),
        ring_weights_wait=passes.ring_weights_wait and bool(ring) and (early or not biased),
        ring_ahead=early or (passes.ring_ahead and bool(ring) and gated),
        scores_late=passes.scores_late and ring == "embed" and model.parallel_block,
        # What differs between chips, where it is read: all others share a walk.
        scores_twice=passes.scores_twice if passes.attends_first or model.causal else 0.0,
        ring_apart=passes.ring_apart and (walk.rows or ring == "embed"),
    )
    return followed(derived, walk.again, passes, ring, signs)


@lru_cache(maxsize=1024)
def ends_trace(model: Model, attention: str, kind: Kind, passes: Passes, ring: str = "") -> Ends:
    """Return what is live while the head runs, forward and at once back."""
    ends = derived_blocks(model, attention, kind).ends
    steps = ends.steps[len(graph(model, attention).before.ops) :]
    order = passes.weights_first and not passes.head_last
    passes = replace(
        passes,
        gradients_waiting=0,
        weights_first=order,
        whole_copies=False,
        logits_apart=not model.tied_embeddings,
    )
    tracer = Tracer(passes, ring)
    tracer.moment("enter the head")
    tracer.make("x", stored(steps[0].op.ins[0]))
    for step in steps:
        tracer.forward(step)
    late = tracer.late(steps)
    for step in reversed(steps):
        if step.trained:
            tracer.backward(step)
    trace = tracer.trace(0)
    names = {f"d {name}, whole" for name in tracer.gradients}
    whole = [array for array in trace.arrays if array.name in names]
    return Ends(trace, tuple(late), tuple(whole), tuple(summed(steps)))


def summed(steps: Iterable[Step]) -> Iterator[tuple[Size, frozenset[str]]]:
    """Return what ops make that devices sum whole, and over which axes."""
    for step in steps:
        for move in step.settles:
            if move.kind == "all-reduce":
                out = step.op.out
                yield Size(out.dims, by_place(out, step.place), width_of(out)), move.axes


@lru_cache(maxsize=1024)
def forward_trace(
    model: Model, attention: str, layer: int | None, kind: Kind, passes: Passes, mode: Mode
) -> Trace:
    """Return what is live while a layer, or with none the head, runs forward and nothing after."""
    derived = derived_blocks(model, attention, kind)
    before = len(graph(model, attention).before.ops) if layer is None else 0
    steps = (derived.ends if layer is None else derived.layers[layer]).steps[before:]
    tracer = Tracer(passes, mode.ring)
    tracer.moment("enter")
    tracer.make(steps[0].op.ins[0].name, stored(steps[0].op.ins[0]))
    for step in steps:
        tracer.forward(step)
    return tracer.trace(passes.gathers_ahead if mode.prefetch else 0)


def followed(
    derived: Derived, again: Sequence[int], passes: Passes, ring: str = "", signs: bool = False
) -> Tracer:
    """Return the tracer of a derived block that runs back, after the ops in `again` ran again."""
    tracer = Tracer(passes, ring, signs)
    steps = derived.steps
    tracer.moment("enter")
    tracer.make(derived.start.name, stored(derived.start))
    tracer.make(f"d {steps[-1].op.out.name}", stored(steps[-1].op.out))
    if passes.gates_fused and not ring:
        gated = (step.op for step in steps if step.op.stream == GATE)
        tracer.fused = frozenset(op.ins[0].name for op in gated)
    if passes.turned_wide:
        rotated = (step.op.out.name for step in steps if step.op.stream == ROTATE)
        tracer.turned = frozenset(rotated)
    last = {n for n, step in enumerate(steps) if passes.attends_first and _of_mlp(step)}
    late = {n for n in again if passes.scores_late and _of_scores(steps[n])}
    gates = _of_gates(steps) if passes.hidden_first else frozenset()
    projected = gates.intersection(again)
    first = set(range(len(steps))) - last
    made = first | last if passes.mlp_again_first else first
    for making, some in ((made, first), (last - made, last)):
        for number in (n for n in again if n in making - late - projected):
            tracer.forward(steps[number], " again")
        for number in sorted(some, reverse=True):
            while late and _of_scores(steps[number]):
                tracer.forward(steps[min(late)], " again")
                late.remove(min(late))
            if projected and _of_mlp(steps[number]) and steps[number].trained:
                tracer.operand_first(steps[number])
                for n in sorted(projected):
                    tracer.forward(steps[n], " again")
                projected = frozenset()
                tracer.weight_last(steps[number])
            elif steps[number].trained:
                tracer.backward(steps[number])
    if passes.ring_ahead:
        tracer.put_together_ahead()
    if passes.places_last:
        tracer.put_together_last(steps)
    if passes.ring_empty:
        tracer.empties(steps)
    return tracer


def _of_scores(step: Step) -> bool:
    """Return whether an op makes scores in HBM, softmax of them, or attention's result."""
    return step.op.unit == "attention" and not step.op.kernel


def _of_gates(steps: Sequence[Step]) -> frozenset[int]:
    """Return the ops that make a hidden layer that is gated, or what it is made of."""
    gates = [one.op for one in steps if one.op.stream == GATE and not one.op.kernel]
    made = {array.name for op in gates for array in (*op.ins, op.out)}
    outs = enumerate(step.op.out for step in steps)
    return frozenset(n for n, out in outs if out.name in made and "mlp" in out.dims)


def _of_mlp(step: Step) -> bool:
    """Return whether an op works on an MLP's hidden layer."""
    return any("mlp" in array.dims for array in (*step.op.ins, step.op.out))
