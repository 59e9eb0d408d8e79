"""Keys and values that are gathered over a context axis: started when they are made, awaited where
attention reads them.

Queries are made last, so that their projection hides what it can; where attention does not run
again, all of the MLP's gradient lies between. As gathers of weights they overlap if the plan says
`overlap.weights`, which compiler options do for all of them. Those that a policy keeps are gathered
where they are read, beside nothing. Of a layer's four gathers six compiled plans "context 4" on v4,
v5e, v5p and v6e hid one to two and a half (docs/compiled.md).

Where SparseCores move them (`switch` "always"), weights and gradients of weights start behind them,
and gradients of keys and values are scattered beside what queries' gradient has to do (programs
"context 4" of llama3-70b and llama3-8b on tpu7x in docs/compiled.md). Where they also lay out what
heads make (`after_queries`), they begin to gather once all of it is there: only what turns queries
hides that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeGuard

import numpy as np

from shardsim.plan.layout import Layout, Number, somewhere
from shardsim.program.schedule import Await, Block, Start, Task
from shardsim.program.tasks import KEYS, Collective, Compute, makes_weight_gradient

LAYERS = ("forward", "backward")


def gathered_when_made(block: Block, layout: Layout) -> tuple[Task, ...]:
    """Return a block's tasks, with gathers of keys and values beside what runs until they are
    read."""
    on = np.asarray(layout.weights_overlap, dtype=bool)
    if block.phase not in LAYERS or not somewhere(on) or not any(map(_gathers_keys, block.tasks)):
        return block.tasks
    tasks, places = _queries_last([*block.tasks])
    started: dict[int, list[Task]] = {}  # by the place of what they stand before
    awaited: dict[int, list[Task]] = {}
    moved = [(at, task) for at, task in enumerate(tasks) if _gathers_keys(task)]
    for number, (own, move) in enumerate(moved):
        begin, made = places[number] if number < len(places) else _made_before(tasks, own)
        late = move.after_queries & bool(places)
        left = move.count * (on & made)
        for at, reader in enumerate(tasks[begin:], begin):
            if not isinstance(reader, Compute) or reader.kind != "attention":
                continue
            here = left * np.greater(reader.count, 0)
            behind = places[-1][0] + 1 if places else begin  # the product that makes queries
            for place, title, count in (
                (begin, f"{move.name} for {reader.name}", here * np.logical_not(late)),
                (behind, f"{move.name} behind queries, for {reader.name}", here * late),
            ):
                if somewhere(count):
                    begun = Start(task=replace(move, name=title, count=count))
                    started.setdefault(place, []).append(begun)
                    awaited.setdefault(at, []).append(Await(name=title))
            left = left * np.equal(reader.count, 0)
        tasks[own] = replace(move, count=move.count * np.logical_not(on & made) + left)
    return tuple(
        one
        for at, task in enumerate(tasks)
        for one in (*started.get(at, ()), *awaited.get(at, ()), task)
    )


def scattered_beside_queries(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks with scatters of keys' and values' gradients beside what comes from queries'
    gradient, where they may run beside anything; else as they are."""
    at = [number for number, task in enumerate(tasks) if _beside_all(task, "reduce-scatter")]
    if len(at) != 2:  # none; or of something else that two projections read
        return [*tasks]
    ends: list[int] = []  # of what reads them, and of what queries' gradient has to do
    for after in (*at, None):
        begin = ends[-1] + 1 if after is None else after + 1
        weights = (n for n, task in enumerate(tasks[begin:], begin) if makes_weight_gradient(task))
        if (end := next(weights, None)) is None or (not ends and end > at[1]):
            return [*tasks]
        ends.append(end)
    starts: list[Task] = []
    readers: list[Task] = []
    for number, end in zip(at, ends, strict=False):
        scatter = tasks[number]
        assert isinstance(scatter, Collective)
        starts.append(Start(task=scatter))
        readers += [Await(name=scatter.name), *tasks[number + 1 : end + 1]]
    queries = tasks[ends[1] + 1 : ends[2] + 1]
    return [*tasks[: at[0]], *starts, *queries, *readers, *tasks[ends[2] + 1 :]]


def behind_keys(ahead: Sequence[Task], tasks: Sequence[Task]) -> list[Task]:
    """Return a block's tasks after what a trip starts with, `ahead`: behind the last gather of keys
    that SparseCores do, if there are such."""
    gathers = [
        number
        for number, task in enumerate(tasks)
        if isinstance(task, Start) and _beside_all(task.task, "all-gather")
    ]
    place = max(gathers, default=-1) + 1
    later = [task for task in ahead if place and isinstance(task, Start) and task.when != "first"]
    first = [task for task in ahead if not any(task is one for one in later)]
    return [*first, *tasks[:place], *later, *tasks[place:]]


def _beside_all(task: object, kind: str) -> TypeGuard[Collective]:
    """Return whether keys or values, or their gradients, move so beside anything."""
    if not isinstance(task, Collective) or (task.purpose, task.kind) != (KEYS, kind):
        return False
    return task.switch == "always" and somewhere(task.count)


def _gathers_keys(task: Task) -> TypeGuard[Collective]:
    if not isinstance(task, Collective) or not somewhere(task.count):
        return False
    return (task.purpose, task.kind, task.schedule) == (KEYS, "all-gather", "exposed")


def _made_before(tasks: list[Task], own: int) -> tuple[int, Number]:
    """Return by which place what a gather takes is made, at the latest, and whether it is."""
    for at, task in reversed([*enumerate(tasks[:own])]):
        if isinstance(task, Compute) and task.makes == "qkv":
            return at + 1, np.greater(task.count, 0)
    return own, np.False_


def _queries_last(tasks: list[Task]) -> tuple[list[Task], tuple[tuple[int, Number], ...]]:
    """Return tasks with keys and values before queries, and the places by which each of those is
    made, with whether it is; none where an attention does not have one product for each."""
    works = [(at, task) for at, task in enumerate(tasks) if isinstance(task, Compute)]
    made = [(at, np.greater(task.count, 0)) for at, task in works if task.makes == "qkv"]
    if len(made) != 3:  # kept, or made by one product, out of latents, or of two attentions
        return tasks, ()
    (query, _), (key, _), (value, there) = made
    ends = [at for at, task in works if task.kind in ("matmul", "attention")]
    ends += [at for at, task in enumerate(tasks) if _gathers_keys(task)]
    end = min(at for at in ends if at > value)
    keys, values = (
        [task for task in some if not isinstance(task, Start | Await)]
        for some in (tasks[key:value], tasks[value:end])
    )
    # Copies to the host and back stand where all three are there, in whatever order.
    copies = [task for task in tasks[key:end] if isinstance(task, Start | Await)]
    ordered = [*tasks[:query], *keys, *values, *tasks[query:key], *copies, *tasks[end:]]
    after_keys = query + len(keys)
    return ordered, ((after_keys, there), (after_keys + len(values), there))
