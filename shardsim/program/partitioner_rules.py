"""Rules about what XLA's partitioner makes of collective matmuls where a plan leaves them to it.

It looks at one product at a time (`GetWindowedEinsumConfiguration` in dot_handler.cc, openxla/xla
at 0df7454), and so do these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shardsim.plan.layout import Number, closes
from shardsim.program.rings import runs_as_ring
from shardsim.program.rules import LAYER_PHASES, Where
from shardsim.program.schedule import Block, Task
from shardsim.program.tasks import Collective, Compute


def ring_each_product(block: Block, where: Where) -> Block:
    """Give every product that is long enough a ring of its own, where the compiler's partitioner
    writes the collectives: sums of the others travel together, at once. It gathers whole what
    several products read, or none long enough, and what gradients of weights read once more.
    Zeros go round first, once for all rings that add up.

    XLA's partitioner takes no ring if the longer of product and collective, with two hops more,
    takes as long as both together (openxla/xla at 0df7454, dot_handler.cc). Seven compiled programs
    with a tensor axis of 4 (docs/compiled.md): rings of products of 1,536 columns or more a device
    on v4 (ViT-22B, maxtext-22b, palm-8b), of 2,048 on v5e (vit-bigg, maxtext-16b), of 2,752 on v5p
    (llama2-7b), none of 1,280 on v4 (vit-h-14), of 1,024 (palm-8b, llama2-7b) or 416 (vit-bigg).
    """
    if not where.layout.partitioned:
        return block
    products = {task.name: task for task in block.tasks if isinstance(task, Compute)}
    made: list[Task] = []
    summed: list[Collective] = []
    for task in block.tasks:
        if not isinstance(task, Collective) or task.schedule != "ring":
            made.append(task)
            continue
        partners = [products[name] for name in task.partners if name in products]
        if task.kind == "all-gather":
            made += _gathered(task, partners, where, block.phase in LAYER_PHASES)
            continue
        rings, rest = _scattered(task, partners, where)
        made += [*rings, *rest]
        summed += rings
    return replace(block, tasks=(*_zeros(summed, where), *made))


def _gathered(
    task: Collective, partners: Sequence[Compute], where: Where, layers: bool
) -> list[Task]:
    """Return a gather as a ring of its one reader, and whole for those that read all of it."""
    readers = [one for one in partners if not one.of_weights]
    whole = replace(task, schedule="exposed", partners=())
    if len(readers) != 1 or (not layers and len(partners) > 1):
        return [whole]
    (reader,) = readers
    cut = _pays(task, reader, where) & np.greater(reader.count, 0)
    others = len(partners) > 1
    return [
        *_where(replace(whole, name=f"{task.name}, whole"), True if others else ~cut),
        *_where(replace(task, partners=(reader.name,)), cut),
    ]


def _scattered(
    task: Collective, partners: Sequence[Compute], where: Where
) -> tuple[list[Collective], list[Collective]]:
    """Return a ring for each product that pays, and what is left as one collective."""
    cut = [_pays(task, one, where) for one in partners]
    rings = [
        ring
        for one, on in zip(partners, cut, strict=True)
        for ring in _where(
            replace(task, name=f"{task.name} of {one.name}", partners=(one.name,)), on
        )
    ]
    whole = replace(task, schedule="exposed", partners=())
    return rings, _where(whole, ~np.logical_and.reduce(cut))


def _zeros(rings: Sequence[Collective], where: Where) -> list[Collective]:
    """Return the first hops of rings that add up, both ways: they carry zeros."""
    if not rings:
        return []
    first = rings[0]
    members = where.layout.role(first.role).size
    on = np.logical_or.reduce([runs_as_ring(ring, where.layout) for ring in rings])
    ways = 1 if where.permutes_wait else 2
    hop = replace(
        first,
        name="zeros before rings",
        kind="permute",
        bytes=ways * first.bytes / members,
        schedule="exposed",
        partners=(),
        ways=ways,
        stage="closing",
    )
    return _where(hop, (3 - ways) * (on & np.equal(np.mod(members, 4), 0)))


def _where(task: Collective, on: Number) -> list[Collective]:
    """Return a collective where it takes place."""
    return [replace(task, count=task.count * on)] if np.any(on) else []


def _pays(task: Collective, product: Compute, where: Where) -> Number:
    """Return whether a product is cut for the ring of what it reads or adds up to."""
    chip, axis = where.machine.chip, where.layout.role(task.role)
    rate: Number = 0.0
    for torus, factor, stride in zip(where.machine.axes, axis.factors, axis.strides, strict=True):
        ways = 1.0 + closes(torus, factor, stride)
        rate = rate + np.greater(factor, 1) * torus.bytes_per_s * ways / stride
    members = axis.size
    bytes_per_s = np.where(np.greater(rate, 0), rate, 1.0) * chip.link_efficiency
    moved_s = task.bytes * (members - 1) / members / bytes_per_s
    product_s = product.flops / chip.peak(product.dtype) * chip.devices_per_chip
    ring_s = np.maximum(product_s, moved_s) + 2.0 * moved_s / members
    return where.ring & np.less(ring_s, product_s + moved_s)
