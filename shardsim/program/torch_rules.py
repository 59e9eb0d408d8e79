"""Rules of torchtitan's step on GPUs: what PyTorch runs beyond a plan in code of its own.

Read in pytorch/torchtitan at 9dec370 (models/llama/model.py, parallelisms/parallelize_llama.py) and
in the PyTorch of its time (torch/distributed). Each layer is compiled by itself, so elementwise
work is fused, but for what its compiler has no code for. Nothing else runs while a collective does
that is part of a compiled layer (`_maybe_wrap_tensor` in _functional_collectives.py awaits it where
it stands), unless a ring takes its place.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shardsim.plan.layout import SEQUENCE_SHARDED
from shardsim.plan.precision import DTYPE_BYTES
from shardsim.program.rings import SUM_BYTES, runs_as_ring
from shardsim.program.rounds import ROUND
from shardsim.program.rules import GATHERED_WEIGHTS, Where, attends, changed, copy, stream, width
from shardsim.program.schedule import Block, Task
from shardsim.program.tasks import (
    ATTENTION_GRADIENT,
    BY_HEAD,
    KEYS,
    Collective,
    Compute,
)

# Bytes of an element that is rotated: cast to float32 (2 + 4), multiplied as a complex number
# (4 + 4), cast back (4 + 2).
ROTATED_BYTES = 20.0
ELEMENT = float(DTYPE_BYTES["bf16"])


def rotate_as_complex_numbers(block: Block, where: Where) -> Block:
    """Rotate queries and keys, and their gradients, as complex numbers of float32, in three passes:
    PyTorch's compiler has no code for them (`apply_rotary_emb` of torchtitan, and its issue 15)."""

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or task.purpose != BY_HEAD or not task.turns:
            return [task]
        return [replace(task, hbm_bytes=ROTATED_BYTES * task.pointwise)]

    return changed(block, change)


def repeat_keys(block: Block, where: Where) -> Block:
    """Repeat keys and values for all heads of queries that share one, add their gradients up again,
    and let as many pass round a context axis (`repeat_kv` of torchtitan)."""
    shared = next((task.shared for task in block.tasks if attends(task)), 1.0)

    def change(task: Task) -> list[Task]:
        if isinstance(task, Collective) and task.purpose == KEYS:
            return [replace(task, bytes=task.bytes * shared)]
        if not attends(task):
            return [task]
        own = 2.0 * task.n * task.k * task.batch * width(task) / where.layout.context.size
        count = task.count * np.greater(task.shared, 1)
        name = f"repeat keys for {task.name}"
        repeated = stream(name, "elementwise", own * (1.0 + 1.0 / task.shared), count)
        back = task.purpose == ATTENTION_GRADIENT
        return [task, *repeated] if back else [*repeated, task]

    return changed(block, change)


def merge_rounds(block: Block, where: Where) -> Block:
    """Add up in float32, in HBM, what attention makes of the keys of each member of a context axis;
    send gradients of keys and values round in float32, where each member adds its own, and prepare
    the gradient's kernel anew for each.

    `_templated_ring_attention` and its backward pass, which `convert_to_f32` (torch/distributed/
    tensor/experimental/_attention.py). All wait for the last member, which has all queries at work
    on half of what comes.
    """
    members = where.layout.context.size

    def change(task: Task) -> list[Task]:
        if isinstance(task, Collective) and task.purpose == KEYS and task.schedule == ROUND:
            sums = task.kind == "reduce-scatter"
            return [replace(task, bytes=task.bytes * (SUM_BYTES / ELEMENT if sums else 1.0))]
        if not attends(task) or not task.ring:
            return [task]
        more = np.maximum(members - 1, 0)
        added = 2.0 * SUM_BYTES + width(task)  # bytes of an element of a sum, once
        moved = added * more * task.m * task.k * task.batch
        if task.purpose == ATTENTION_GRADIENT:  # of keys and values too, once for each member
            moved = moved + 2.0 * added * task.n * task.k * task.batch
            task = replace(task, hbm_bytes=task.hbm_bytes * np.maximum(members, 1))
        count = task.count * np.greater(members, 1)
        return [task, *stream(f"add up {task.name}", "elementwise", moved, count)]

    return changed(block, change)


def leave_sums_whole(block: Block, where: Where) -> Block:
    """Scatter whole, and wait, where several products add to one sum: a ring takes one
    (`fuse_matmul_reduce_scatter` of torch/_inductor/fx_passes/micro_pipeline_tp.py)."""
    whole = {
        name
        for task in block.tasks
        if isinstance(task, Collective) and _sums_several(task)
        for name in task.partners
    }

    def change(task: Task) -> list[Task]:
        if isinstance(task, Collective) and _sums_several(task):
            return [replace(task, schedule="exposed", partners=())]
        if isinstance(task, Compute) and task.name in whole and task.ring == "scattered":
            return [replace(task, ring="")]
        return [task]

    return changed(block, change)


def _sums_several(task: Collective) -> bool:
    return (task.kind, task.schedule) == ("reduce-scatter", "ring") and len(task.partners) > 1


def copy_tokens_into_order(block: Block, where: Where) -> Block:
    """Copy what is gathered or scattered along the sequence: PyTorch's collectives do so along the
    first dimension, which is the batch (`all_gather_tensor` and `reduce_scatter_tensor` of
    _functional_collectives.py). Where rings run products write in the order that is needed."""
    layout = where.layout
    on = np.equal(layout.residual, SEQUENCE_SHARDED) & np.greater(layout.tensor.size, 1)

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or task.role != "tensor":
            return [task]
        if task.kind not in ("all-gather", "reduce-scatter") or task.purpose in GATHERED_WEIGHTS:
            return [task]
        plain = on & np.logical_not(runs_as_ring(task, layout))
        copied = copy(task.name, "copy", task.bytes, task.count * plain)
        return [task, *copied] if task.kind == "all-gather" else [*copied, task]

    return changed(block, change) if np.any(on) else block


def copy_out_of_gathers(block: Block, where: Where) -> Block:
    """Copy gathered weights out of the buffer in which all of a layer's come
    (`foreach_all_gather_copy_out` in torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py)."""

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or task.kind != "all-gather":
            return [task]
        if task.purpose not in GATHERED_WEIGHTS:
            return [task]
        several = np.greater(where.layout.role(task.role).size, 1)
        return [*copy(f"{task.name}, out", "copy", task.bytes, task.count * several), task]

    return changed(block, change)
