"""Rules about collectives: what a compiler or a library sends in another form than planned, or lets
wait."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardsim.plan.layout import Number, heads_as_columns, somewhere
from shardsim.plan.precision import DTYPE_BYTES
from shardsim.program.quantise import OPS
from shardsim.program.rounds import ROUND
from shardsim.program.rules import (
    GATHERED_WEIGHTS,
    LAYER_PHASES,
    Where,
    attends,
    changed,
    of_layer_weights,
    over_whole_slice,
    stream,
    sums_to_gather,
)
from shardsim.program.schedule import Await, Block, Copy, Repeat, Start, Task
from shardsim.program.tasks import KEYS, NARROWED, NEVER, Collective, Compute
from shardsim.records import replace

# Share of a layer's gathers that the TPU compiler does not overlap: of two large and four small
# matrices one large and one small forward, both large and two small ones backward (read off
# maxtext-22b, fully sharded on v4:4x4x4).
AWAITED = {"forward": 0.42, "backward": 0.83}
ELEMENT = float(DTYPE_BYTES["bf16"])  # of what is gathered


def gather_for_the_others(block: Block, where: Where) -> Block:
    """Gather whole, before the ring, what several matmuls read: the partitioner cuts the gather for
    one of them, and the others take it whole.

    Three a layer, synchronous, beside their rings, in MaxText's compiled programs of maxtext-32b,
    maxtext-128b and maxtext-1024b on v5p; as many bytes in that of llama3-70b (docs/trainers.md).
    """

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or task.schedule != "ring" or task.kind != "all-gather":
            return [task]
        if len(task.partners) < 2 or block.phase not in LAYER_PHASES:
            return [task]
        name, count = f"{task.name}, for the others", task.count * where.ring
        return [replace(task, name=name, schedule="exposed", partners=(), count=count), task]

    return changed(block, change) if np.any(where.ring) else block


def gather_in_8_bits(block: Block, where: Where) -> Block:
    """Cast to 8 bits before the gather over a tensor axis what products read in 8, each member its
    own part; back, what gradients of weights read was cast forward. What a router reads too, or is
    made of what is gathered, is cast behind it.

    XLA's partitioner lays out anew what a product reads, which is what was cast (openxla/xla,
    spmd/dot_handler.cc). Not seen compiled: of MLPerf's GPT-3 in docs/accuracy.md it explains a
    third of what was missing.
    """
    return _gathered_in_8_bits(block, where, 0.0)


def gather_in_8_bits_and_turn(block: Block, where: Where) -> Block:
    """Cast to 8 bits before the gather over a tensor axis what products read in 8, as on TPUs; what
    comes is turned for gradients of weights (`narrow_both_ways`).

    `float8_tensor_parallel.py` of pytorch/ao (scales of whole arrays) and Transformer Engine
    (`gather_along_first_dim`) do so.
    """
    return _gathered_in_8_bits(block, where, 1.0)


def _gathered_in_8_bits(block: Block, where: Where, turned: float) -> Block:
    """Return a block that gathers 8 bits; of casts so many bytes an element are written `turned`
    besides, of which all that was gathered is read and written."""
    tensor = where.layout.tensor.size
    split = np.greater(tensor, 1)
    if not np.any(split):
        return block
    tasks: list[Task] = []
    gather: int | None = None  # what no operation has read yet
    for task in block.tasks:
        if isinstance(task, Collective) and (task.kind, task.role) == ("all-gather", "tensor"):
            gather = len(tasks)
        elif isinstance(task, Compute) and gather is not None:
            whole = tasks[gather]
            assert isinstance(whole, Collective)
            if task.purpose == NARROWED:
                elements = task.vector_ops / OPS
                own = split & np.isclose(whole.bytes, ELEMENT * elements)  # it casts what came
                cast = (task.hbm_bytes - turned * elements) / tensor + 2.0 * turned * elements
                cut = np.where(own, cast, task.hbm_bytes)
                ops = np.where(own, task.vector_ops / tensor, task.vector_ops)
                task = replace(task, hbm_bytes=cut, vector_ops=ops)
                narrow = split if block.phase == "backward" else own
                size = whole.bytes / np.where(narrow, ELEMENT, 1.0)
                tasks[gather] = replace(whole, bytes=size)
            gather = None
        tasks.append(task)
    return replace(block, tasks=tuple(tasks))


def exchange_parts_of_embed(block: Block, where: Where) -> Block:
    """Exchange over an expert axis what each member of the tensor axis has of embed, or as much of
    its tokens, and gather it where experts are; back, scatter its sums there before they return.

    MaxText's `activation_embed_moe` lies over tensor (AI-Hypercomputer/maxtext at e591f30cb,
    configs/base.yml and `dense_matmul` in layers/moe.py); Megatron's dispatcher sends the tokens
    that each member has, and gathers behind that (`MoEAlltoAllTokenDispatcher` in
    megatron/core/transformer/moe/token_dispatcher.py, NVIDIA/Megatron-LM at d98e8a64).
    """
    tensor = where.layout.tensor.size

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or not task.whole:
            return [task]
        kind = "all-gather" if task.whole == "gathered" else "reduce-scatter"
        part = replace(task, bytes=task.bytes / tensor)
        name = f"{task.name}, over tensor"
        rest = replace(task, name=name, kind=kind, role="tensor")
        return [part, rest] if task.whole == "gathered" else [rest, part]

    return changed(block, change) if np.any(np.greater(tensor, 1)) else block


def stop_for_hops(block: Block, where: Where) -> Block:
    """Stop all work for every hop of a ring, one direction after the other, on slices for which
    the compiler makes no permute asynchronous.

    Compiled for v5e, larger than 4x4 (`async_permute_chips` in hardware/v5e.yaml; the rings of
    maxtext-16b in docs/compiled.md).
    """
    if not where.permutes_wait:
        return block

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or task.schedule not in ("ring", ROUND):
            return [task]
        return [replace(task, hops_wait=True)]

    return changed(block, change)


def all_reduce_over_whole_slices(block: Block, where: Where) -> Block:
    """Make an all-reduce of a reduce-scatter of weights over a whole slice: twice the bytes.
    SparseCores scatter as planned (tpu7x).

    Counted in compiled programs, emitted ones (docs/compiled.md, `shardsim/xla/compare.py`) and
    MaxText's (docs/trainers.md).
    """

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or task.purpose not in GATHERED_WEIGHTS:
            return [task]
        if task.kind != "reduce-scatter" or not np.any(chosen := over_whole_slice(task, where)):
            return [task]
        return _all_reduced(task, task, chosen)

    return changed(block, change)


def all_reduce_instead_of_waiting_gathers(block: Block, where: Where) -> Block:
    """Make an all-reduce of an all-gather of weights over a whole slice that is not to overlap:
    twice the bytes. SparseCores gather as planned (tpu7x), and so do slices of two dimensions.

    Counted in compiled programs (docs/compiled.md, `shardsim/xla/compare.py`): five on v4 and v5p,
    and four on v5e and v6e (maxtext-16b, vit-bigg, llama3-8b, ViT-22B). What is summed is an array
    of zeros with the own shard in it, filled as slowly as a transpose turns as much (llama2-70b on
    v5p 0.98 s, priced 0.85; maxtext-22b on v4 0.36 and 0.41).
    """

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or task.purpose not in GATHERED_WEIGHTS:
            return [task]
        if task.kind != "all-gather" or not np.any(chosen := sums_to_gather(task, where)):
            return [task]
        filled = stream(f"zeros: {task.name}", "transpose", 2.0 * task.bytes, task.count * chosen)
        return [*filled, *_all_reduced(replace(task, schedule="exposed"), task, chosen)]

    return changed(block, change)


def _all_reduced(summed: Collective, task: Collective, chosen: Number) -> list[Task]:
    """Return a collective as an all-reduce, `summed`, where `chosen`, and as it is elsewhere."""
    summed = replace(summed, name=f"{task.name}, all-reduced", kind="all-reduce")
    if np.all(chosen):
        return [summed]
    kept = replace(task, count=task.count * np.logical_not(chosen))
    return [kept, replace(summed, count=task.count * chosen)]


def offload_to_sparse_cores(block: Block, where: Where) -> Block:
    """Gather weights and scatter their gradients beside all else, whatever the plan says, on chips
    whose SparseCores do it; keys and values of a context axis before them, and their gradients
    beside those of queries (`offloads_collectives` in hardware/tpu7x.yaml; plans of llama3-70b and
    llama3-8b in docs/compiled.md)."""
    if not where.machine.chip.offloads_collectives:
        return block

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective):
            return [task]
        offloaded = (task.purpose in GATHERED_WEIGHTS and task.switch) or task.purpose == KEYS
        return [replace(task, switch="always") if offloaded else task]

    return changed(block, change)


def gather_keys_behind_queries(block: Block, where: Where) -> Block:
    """Gather keys and values of a context axis not before queries are made, where SparseCores lay
    out by head what products have made as columns: they do that first.

    Llama 3 70B on tpu7x in docs/compiled.md: of 2.74 ms a layer and pass 1.31 wait, 1.43 are hidden
    by what turns queries, 3.1 million cycles (two plans, forward and again).
    """
    head_dim = next((task.k for task in block.tasks if attends(task)), np.inf)
    late = heads_as_columns(where.machine.chip, where.layout, head_dim)

    def change(task: Task) -> list[Task]:
        gathers = isinstance(task, Collective) and task.purpose == KEYS
        return [replace(task, after_queries=late) if gathers else task]

    return changed(block, change)


def wait_for_gradients(block: Block, where: Where) -> Block:
    """Sum gradients where they are made, and run nothing meanwhile, whatever the plan says: no
    option makes a reduction asynchronous, but where SparseCores do it. Waits of eight compiled
    techniques on v5p that let them overlap (docs/compiled.md) are predicted within 11 % so, and up
    to five times too short otherwise (hybrid 0.022 s, compiled 0.024, otherwise 0.009).
    """
    if where.machine.chip.offloads_collectives:
        return block

    def change(task: Task) -> list[Task]:
        own = isinstance(task, Collective) and task.switch == "gradients_overlap"
        return [replace(task, switch=NEVER) if own else task]

    return changed(block, change)


def await_some_gathers(block: Block, where: Where) -> Block:
    """Let a share of a layer's gathers run beside nothing, once those of the next are on their way,
    as they are where weights may overlap.

    Of two large and four small matrices one of each waits forward, both large and two small ones
    backward (read off maxtext-22b, fully sharded on v4:4x4x4; within 0.02 s on v4, v5e and v5p).
    """
    awaits = np.asarray(where.layout.weights_overlap) & (
        not where.machine.chip.offloads_collectives
    )
    share = AWAITED.get(block.phase, 0.0) * awaits
    kept: list[Task] = []
    last: list[Task] = []
    at = 0  # behind the last operation that no reduction waits for
    for task in block.tasks:
        if somewhere(share) and of_layer_weights(task, "all-gather"):
            part = {"bytes": task.bytes * share, "messages": task.messages * share}
            last.append(replace(task, name=f"{task.name}, awaited", schedule="exposed", **part))
            rest = {"bytes": task.bytes - part["bytes"]}
            rest["messages"] = task.messages - part["messages"]
            task = replace(task, **rest)
        elif isinstance(task, Collective) and task.schedule == "behind" and not at:
            at = len(kept)
        kept.append(task)
    at = at or len(kept)
    return replace(block, tasks=(*kept[:at], *last, *kept[at:]))


def copy_beside_a_part(block: Block, where: Where) -> Block:
    """Copy what a layer keeps in the host's memory while the next one runs, until that makes the
    same anew in its place: beside what does not come from it, which a serial block has before it
    alone; a layer's input beside all of the layer. As compiled, ViT-22B on v4, whose MLP runs
    first, waits for no queries, keys and values, and for half of its hidden layers; Llama 3 8B on
    v5e and a decoder on v5p wait for all of them but what a norm takes (docs/compiled.md).
    """
    copies = (task.task for task in block.tasks if isinstance(task, Start))
    away = [copy for copy in copies if isinstance(copy, Copy) and copy.keeps]
    tasks = [*block.tasks]
    placed: list[tuple[Copy, list[Compute]]] = []
    for copy in away:
        parts = _parts_without(block.tasks, copy.keeps)
        if parts:
            tasks = [task for task in tasks if getattr(task, "name", "") != copy.name]
        for number, (part, longest) in enumerate(parts):
            moved = {"hbm_bytes": copy.hbm_bytes * longest, "host_bytes": copy.host_bytes * longest}
            name = copy.name if len(parts) == 1 else f"{copy.name}, beside part {number + 1}"
            placed.append((replace(copy, name=name, **moved), part))
    for copy, part in sorted(placed, key=lambda one: len(one[1]), reverse=True):
        tasks = _beside_a_part(tasks, copy, part)
    return replace(block, tasks=tuple(tasks))


def _parts_without(tasks: Sequence[Task], keeps: str) -> list[tuple[list[Compute], Number]]:
    """Return the parts of a layer that do not come from what policies call `keeps`, each with where
    it is the longest, by operations; nothing if no product makes that."""
    works = [task for task in tasks if isinstance(task, Compute)]
    if not any(task.makes == keeps for task in works):
        return []
    parts: list[list[Compute]] = [[]]
    comes_from = False
    for task in works:
        if task.made_of:  # else it is of what is before it
            comes_from = keeps in task.made_of
        if not comes_from:
            parts[-1].append(task)
        elif parts[-1]:
            parts.append([])
    sums = (sum((task.flops * task.count for task in part), 0.0) for part in parts if part)
    longest = np.argmax(np.stack(np.broadcast_arrays(*sums)), axis=0)
    found = ((part, np.equal(longest, number)) for number, part in enumerate(filter(None, parts)))
    return [(part, there) for part, there in found if somewhere(there)]


def _beside_a_part(tasks: list[Task], copy: Copy, part: Sequence[Compute]) -> list[Task]:
    """Return tasks of a layer with a copy beside a part of them."""
    begun, ended = Start(task=copy), Await(name=copy.name)
    first, last = (
        next(at for at, t in enumerate(tasks) if t is task) for task in (part[0], part[-1])
    )
    # From the operation before it to the one behind, with what is sent in between.
    while first and not isinstance(tasks[first - 1], Compute | Repeat):
        first -= 1
    while last + 1 < len(tasks) and not isinstance(tasks[last + 1], Compute | Repeat):
        last += 1
    return [*tasks[:first], begun, *tasks[first : last + 1], ended, *tasks[last + 1 :]]
