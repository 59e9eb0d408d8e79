"""Rules for GPUs: how XLA runs a planned step in cuBLAS, cuDNN and its own fused kernels.

Nothing is fused into a matmul: what a TPU does in its end is a pass of its own, and so is every sum
of a norm. Read off the compiled steps of a ViT with attention apart, of ViT-22B and of Llama 3 8B
with cuDNN's attention (jax 0.11.2, H100), and held against the measured steps of docs/gpu.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeGuard

import numpy as np

from shardsim.ops.attend import APART_MASKED
from shardsim.ops.attend_kernels import CUDNN_MULTIPLE
from shardsim.ops.exchange import ROUTED
from shardsim.plan.layout import Number
from shardsim.plan.precision import NARROW
from shardsim.program.quantise import OPS
from shardsim.program.rings import SUM_BYTES, runs_as_ring
from shardsim.program.rules import (
    LAYER_PHASES,
    Where,
    attends,
    changed,
    copy,
    in_two,
    stream,
    width,
)
from shardsim.program.schedule import Await, Block, Start, Task
from shardsim.program.tasks import (
    ATTENTION_GRADIENT,
    KEEP,
    NARROWED,
    SOFTMAX,
    SOFTMAX_GRADIENT,
    TAKE,
    Collective,
    Compute,
)

CUDNN_BLOCK = 128  # queries and keys that cuDNN's kernel has at a time
# Arrays of the queries' size that cuDNN's gradient moves: it reads queries, keys, values, the
# result and its gradient and writes three; the rest is the sum of queries' gradients in float32 and
# its preparation. Fitted to the micro-measurements of docs/gpu.md.
CUDNN_GRADIENT_PASSES = 14.5


def pass_sums_apart(block: Block, where: Where) -> Block:
    """Read an array once for each of its sums, and what a matmul made once more to use it."""

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or task.apart_bytes is None:
            return [task]
        kind = "sum" if task.sums else task.kind
        return [replace(task, hbm_bytes=task.apart_bytes, kind=kind)]

    return changed(block, change)


def activate_apart(block: Block, where: Where) -> Block:
    """Run a pointwise operation in a kernel of its own, not in the end of the matmul before it."""

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or task.kind != "matmul" or not np.any(task.pointwise):
            return [task]
        return in_two(task)

    return changed(block, change)


def attend_apart(block: Block, where: Where) -> Block:
    """Lay queries, keys, values and the result out by head for products with scores in HBM, and
    make the scores again for the gradient: what is kept of them is in bf16. Probabilities that are
    made again are laid out a second time for the gradient of values, and their own gradient is no
    longer one kernel; nor is that of more than 256 keys."""
    products = [task for task in block.tasks if _scores_product(task)]
    remade = any(
        isinstance(task, Compute) and task.purpose == SOFTMAX and np.any(task.count)
        for task in block.tasks
    )
    keys = max((float(np.max(task.n)) for task in products), default=0.0)
    once_more = block.phase == "backward" and len(products) <= GRADIENT_PRODUCTS

    def change(task: Task) -> list[Task]:
        if isinstance(task, Compute) and task.purpose == SOFTMAX and block.phase == "backward":
            size = task.pointwise * width(task)
            return [task, *copy(task.name, "transpose", 1.5 * size, task.count)]
        if isinstance(task, Compute) and task.purpose == SOFTMAX_GRADIENT:
            several = np.logical_or(remade, keys > ONE_KERNEL)
            moved = APART_MASKED.gradient_passes * task.pointwise * width(task)
            more = np.maximum(moved - task.hbm_bytes, 0.0) * several
            return [replace(task, hbm_bytes=task.hbm_bytes + more)]
        if not _scores_product(task):
            return [task]
        made: list[Task] = []
        if once_more and task is products[0]:
            wider = task.m * task.n * task.batch * (SUM_BYTES - width(task))
            made = [replace(task, name="scores, again", hbm_bytes=task.hbm_bytes + wider)]
        return [*made, *copy(task.name, "transpose", _heads_bytes(task), task.count), task]

    return changed(block, change)


ONE_KERNEL = 256  # keys of a row whose softmax and gradient XLA makes in one kernel
GRADIENT_PRODUCTS = 4  # of attention apart: of probabilities, values, queries and keys


def attend_by_cudnn(block: Block, where: Where) -> Block:
    """Attend in cuDNN's kernel: lengths are padded for it, blocks that a mask leaves empty are
    skipped, and the gradient sums that of queries in float32."""

    def change(task: Task) -> list[Task]:
        if not attends(task):
            return [task]
        gradient = task.purpose == ATTENTION_GRADIENT
        m, n = _blocks(task.m), _blocks(task.n)
        fraction = (n + CUDNN_BLOCK) / (2.0 * n) if task.causal else 1.0
        if np.any(task.whole_fraction):  # by sequence: their lengths are an operand
            fraction = task.fraction
        queries = task.m * task.k * task.batch * width(task)
        moved = CUDNN_GRADIENT_PASSES * queries if gradient else task.hbm_bytes
        padded = np.not_equal(np.mod(task.m, CUDNN_MULTIPLE), 0)
        arrays = 7.0 if gradient else 4.0
        return [
            replace(
                task,
                m=m,
                n=n,
                fraction=fraction,
                vector_ops=task.vector_ops * fraction / task.fraction,
                hbm_bytes=moved,
            ),
            *copy(f"pad for {task.name}", "copy", arrays * queries * padded, task.count),
        ]

    return changed(block, change)


def _scores_product(task: Task) -> TypeGuard[Compute]:
    """Return whether it is one product of attention with scores in HBM."""
    return isinstance(task, Compute) and task.kind == "attention" and task.matmuls == 1


def _heads_bytes(task: Compute) -> Number:
    """Return the bytes of a product's arrays but the largest, that of pairs."""
    m, k, n = task.m, task.k, task.n
    sizes = (m * k, k * n, m * n)
    pairs = np.maximum(np.maximum(sizes[0], sizes[1]), sizes[2])
    return (sum(sizes) - pairs) * task.batch * width(task)


def _blocks(size: Number) -> Number:
    return np.ceil(size / CUDNN_BLOCK) * CUDNN_BLOCK


def copy_in_and_out(block: Block, where: Where) -> Block:
    """Fill the stacks of what layers keep with zeros, copy each layer's part in, and copy out what
    products read: they take no part of an array. One layer has no stack."""
    several = np.greater(block.trips, 1)

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or task.purpose not in (KEEP, TAKE):
            return [task]
        one = replace(task, kind="copy", count=several)
        if task.purpose == TAKE:
            return [one]
        zeros = stream("fill with zeros", "elementwise", task.hbm_bytes / 2.0, one.count)
        return [one, *zeros]

    return changed(block, change)


def narrow_both_ways(block: Block, where: Where) -> Block:
    """Write what is cast to 8 bits as it lies and turned: products of 8 bits read both operands
    along what they sum over (cuBLAS, data types of Hopper's FP8 products), and gradients of weights
    sum over tokens, where the others sum over features."""

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Compute) or task.purpose != NARROWED:
            return [task]
        return [replace(task, hbm_bytes=task.hbm_bytes + task.vector_ops / OPS)]  # a byte each

    return changed(block, change)


def send_once_to_each_node(block: Block, where: Where) -> Block:
    """Send a token once to each node that has experts of it, and to those from there; add up what
    comes back in the node before it returns. So do DeepEP and HybridEP, which Megatron-Bridge asks
    for (`moe_token_dispatcher_type` flex; NVIDIA-NeMo/Megatron-Bridge at 067f987d)."""
    nodes = where.layout.expert.slices

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or not task.chosen[1]:
            return [task]
        experts, copies = task.chosen
        missed = np.prod([1.0 - experts / nodes / (experts - one) for one in range(copies)], axis=0)
        once = task.bytes * nodes * (1.0 - np.maximum(missed, 0.0)) / copies
        name = f"{task.name}, between nodes"
        return [
            replace(task, name=name, stage="dcn", bytes=np.minimum(once, task.bytes)),
            replace(task, stage="torus"),
        ]

    return changed(block, change) if np.any(np.greater(nodes, 1)) else block


def exchange_beside_another_microbatch(block: Block, where: Where) -> Block:
    """Send tokens to experts and back while another microbatch runs the other way: forward beside
    gradients, gradients beside what is forward (`combined_1f1b_schedule_for_interleaved_pipelining`
    in megatron/core/pipeline_parallel/combined_1f1b.py, NVIDIA/Megatron-LM at d98e8a64). What a
    layer sends is taken to be hidden by as much work as it has itself."""

    def sent(task: Task) -> TypeGuard[Collective]:
        routed = isinstance(task, Collective) and task.purpose == ROUTED
        return routed and getattr(task, "role", "") == "expert"

    if block.phase not in LAYER_PHASES or not any(map(sent, block.tasks)):
        return block
    moves = [task for task in block.tasks if sent(task)]
    rest = [task for task in block.tasks if not sent(task)]
    starts = [Start(task=task) for task in moves]
    ends = [Await(name=task.name) for task in moves]
    return replace(block, tasks=(*starts, *rest, *ends))


def pad_for_products_of_8_bits(block: Block, where: Where) -> Block:
    """Copy what experts get to where each has whole groups of rows, as products of 8 bits take
    them, and what they made out of there. Beside a plain all-to-all that is a kernel of its own
    (`quantization_padding` in megatron/core/transformer/moe/experts.py, NVIDIA/Megatron-LM at
    d98e8a64); the dispatcher that sends once to each node has it in its own."""
    inside = np.equal(where.layout.expert.slices, 1)
    products = [task for task in block.tasks if isinstance(task, Compute) and task.groups]

    def change(task: Task) -> list[Task]:
        if not isinstance(task, Collective) or not task.chosen[1]:
            return [task]
        return [task, *copy(f"pad for {task.name}", "copy", task.bytes, task.count * inside)]

    narrow = any(task.dtype in NARROW for task in products)
    return changed(block, change) if narrow else block


def add_up_summands(block: Block, where: Where) -> Block:
    """Send each member of a ring that scatters its summand as it is made, and add up in a pass what
    has come (`_fused_matmul_reduce_scatter_impl` of torch/distributed/_symmetric_memory, which adds
    to no sum on its way; so do `split_overlap_rs` and `reduce_bf16` of Transformer Engine's
    comm_gemm_overlap)."""
    layout = where.layout
    members = np.maximum(layout.tensor.size, 1)

    def change(task: Task) -> list[Task]:
        if isinstance(task, Compute) and task.ring == "scattered":
            return [replace(task, ring="sent")]
        if not isinstance(task, Collective) or task.kind != "reduce-scatter":
            return [task]
        count = task.count * runs_as_ring(task, layout)
        moved = task.bytes * (1.0 + 1.0 / members)
        return [task, *stream(f"add up {task.name}", "sum", moved, count)]

    return changed(block, change)


def keep_in_place(block: Block, where: Where) -> Block:
    """Keep what the backward pass needs where it was made: PyTorch's autograd has no loop over
    layers and so no stacks (docs/gpu.md)."""

    def change(task: Task) -> list[Task]:
        kept = isinstance(task, Compute) and task.purpose == KEEP
        return [] if kept else [task]

    return changed(block, change)
