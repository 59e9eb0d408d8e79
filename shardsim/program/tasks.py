"""The Program: what a plan wants one device to do in a step, before it is a Schedule.

Partitioning writes its blocks from work and moves, with notes on what may run beside what;
`program/overlap.py` makes the Schedule of it. Figures are as in `program/schedule.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from shardsim.model.blocks import Layer
from shardsim.program.schedule import Block, Move, Number, Work
from shardsim.records import replace

# What operations are for, where an implementation may do them in another way.
ATTENTION = "softmax attention"  # in one kernel: `m` queries, `n` keys, `batch` heads
ATTENTION_GRADIENT = "softmax attention gradient"
SOFTMAX = "softmax"  # of scores in HBM
SOFTMAX_GRADIENT = "softmax gradient"
QUERY_KEY_NORM = "query-key norm"
QUERY_KEY_NORM_GRADIENT = "query-key norm gradient"
LOSS = "loss"  # of logits
LOSS_GRADIENT = "loss gradient"
KEEP = "keep"  # copies what the backward pass needs to where it waits
TAKE = "take"  # copies from there what products read, where they take no part of an array
KEYS = "keys and values"  # gathers them over a context axis, or scatters their gradients
NARROWED = "8 bits"  # casts an operand of products to 8 bits
BY_HEAD = "by head"  # makes queries, keys, values, attention's result, or a gradient of those
NEVER = "never"  # the switch of what runs behind nothing, whatever the plan says
GRADIENT_SWITCHES = ("gradients_overlap", NEVER)  # of what sums gradients
PASSED, WINDOWED = "passed", "passed, in a window"  # rings of attention
# What the gradient of something with a purpose of its own is for.
GRADIENTS = {
    QUERY_KEY_NORM: QUERY_KEY_NORM_GRADIENT,
    SOFTMAX: SOFTMAX_GRADIENT,
    LOSS: LOSS_GRADIENT,
}


@dataclass(frozen=True, kw_only=True)
class Compute(Work):
    """Work of a plan, and how a ring over the tensor axis cuts it.

    `ring` is "gathered" if the input of a matmul comes in pieces, "scattered" or "sent" if its
    result leaves in pieces (`rings.py`); else it runs whole beside the ring. Of attention it is
    `PASSED` if keys and values come round the context axis, `WINDOWED` if a window cuts what comes.
    """

    ring: str = ""
    purpose: str = ""  # one of those above, or nothing
    pointwise: Number = 0  # elements of what it does by element, or of what is fused into its end
    last_fraction: Number = 1.0  # of attention: `fraction`, of the last queries as many as are here
    own_fraction: Number = 1.0  # of attention: `fraction`, of the keys that belong to its queries
    whole_fraction: Number = 0.0  # of attention by sequence: `fraction`, of whole rows
    apart_bytes: Number | None = None  # what it moves where nothing is fused into matmuls
    # Layers' inputs, of what stacks keep: what makes the rest writes it there; none: no stack.
    copied_bytes: Number | None = None
    end_of: str = ""  # the product in whose end it may run; of one that is not there it stays apart
    joined_bytes: Number = 0  # what that moves more then
    beside_bytes: Number = 0  # what it moves more where copies of a token lie side by side
    sums: bool = False  # over rows or columns, where it does
    causal: bool = False  # of attention in one kernel
    shared: Number = 1  # of that: heads of queries that have one of keys and values
    groups: str = ""  # of products of rows in groups of any size: which of `m` and `k` are rows
    blocks: tuple[int, int] = (0, 0)  # of that: the queries and keys that it takes at once
    makes: str = ""  # of products and kernels: what remat policies call the result, forward
    made_of: frozenset[str] = frozenset()  # what they call it and all that it comes from, forward
    of_weights: bool = False  # a gradient of weights, which no other stage waits for
    again: bool = False  # of what the backward pass makes a second time
    sums_heads: bool = False  # of products: what attention made or its gradients, over heads
    # The first to work by head through what a matmul or attention has made: "forward", "gradient".
    turns: str = ""


@dataclass(frozen=True, kw_only=True)
class Collective(Move):
    """A move of a plan, and what may run meanwhile:

    - "exposed": nothing;
    - "ring": the matmuls named in `partners`, cut into blocks (collective matmul), as
      `Layout.matmul_overlap` says;
    - "round": the attention that is its partner, as keys and values pass round (`rounds.py`);
    - "behind": the rest of the block that it is in (weights of the next layer, gradients of the
      last one), if the layout's switch for it is on: `switch` names one of `overlap.SWITCHES`.
    """

    schedule: str = "exposed"
    partners: tuple[str, ...] = ()
    hops_wait: bool = False  # of a ring: work stops for each of its hops
    switch: str = ""
    by_head_bytes: Number = (
        0  # of weights with heads; of gradients, those of weights that make them
    )
    after_queries: Number = False  # of keys and values: not before the product that makes queries
    odd_bytes: Number = 0  # of weights in pieces that are no whole tiles
    odd_columns_bytes: Number = 0  # of those whose pieces are columns
    # Of what goes to experts with all of embed: "gathered" over tensor before, or "summed" after.
    whole: str = ""
    chosen: tuple[int, int] = (0, 0)  # of experts' tokens: of how many experts each has how many


@dataclass(frozen=True, kw_only=True)
class Program:
    """All that one device is to do in one step; `trips` of blocks are those of the whole step."""

    blocks: tuple[Block, ...]
    interleave: int = 1  # parts of the layers that a pipeline stage has

    def block(self, name: str) -> Block:
        """Return the block called `name`."""
        return next(block for block in self.blocks if block.name == name)


Task = Compute | Collective


def makes_weight_gradient(task: object) -> TypeGuard[Compute]:
    """Return whether it is a product that makes the gradient of a weight."""
    return isinstance(task, Compute) and task.of_weights and task.kind == "matmul"


def moves_over_tensor(task: object) -> TypeGuard[Collective]:
    """Return whether it moves what a layer's blocks read and make over the tensor axis."""
    return isinstance(task, Collective) and (task.role, task.purpose) == ("tensor", "block")


def repeated(tasks: Iterable[Task], layer: Layer) -> list[Task]:
    """Return the tasks of a layer as they stand in a round: named after it, and so many times."""
    if not layer.name and layer.times == 1:
        return [*tasks]

    def named(name: str) -> str:
        return f"{name} ({layer.name})" if layer.name else name

    made: list[Task] = []
    for task in tasks:
        if isinstance(task, Collective):
            task = replace(task, partners=tuple(map(named, task.partners)))
        elif task.end_of:
            task = replace(task, end_of=named(task.end_of))
        made.append(replace(task, name=named(task.name), count=task.count * layer.times))
    return made


def fused(tasks: Sequence[Compute], dim: str, wire: float) -> Compute:
    """Return one matmul for several that lie side by side in `dim`: "m", "k" or "n".

    What they have in common, an operand or the result, crosses HBM once.
    """
    first, *rest = tasks
    if not rest:
        return first
    for task in rest:
        shared = {"m": task.k * task.n, "k": task.m * task.n, "n": task.m * task.k}[dim]
        first = replace(
            first,
            name=f"{first.name}+{task.name}",
            m=first.m + task.m * (dim == "m"),
            k=first.k + task.k * (dim == "k"),
            n=first.n + task.n * (dim == "n"),
            hbm_bytes=first.hbm_bytes + task.hbm_bytes - shared * wire,
            vector_ops=first.vector_ops + task.vector_ops,
            pointwise=first.pointwise + task.pointwise,
        )
    return first
