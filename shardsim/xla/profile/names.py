"""What an operation is by its name alone: of HLO instructions, JAX's names and GPU kernels."""

from __future__ import annotations

import re

from shardsim.xla.hlo.opcodes import KINDS
from shardsim.xla.hlo.scopes import phase_of

# Operations that only hold others: what they take beyond these is their own.
CONTAINERS = ("while", "conditional", "call", "async")
# Words in names of operations or kernels, and what these are; the first that is found holds.
# nvjet and cutlass are kernels of cuBLAS, fmha those of cuDNN's attention, splash JAX's on TPUs.
_WORDS = (
    ("attention", ("fmha", "flash", "splash", "sdpa", "attention")),
    ("matmul", ("dot", "gemm", "cublas", "nvjet", "cutlass", "matmul", "convolution", "xmma")),
    ("copy", ("memcpy", "copy", "transpose", "memset")),
)
_NCCL = re.compile(r"nccl\w*?(AllReduce|AllGather|ReduceScatter|SendRecv|AllToAll)", re.IGNORECASE)
_NCCL_KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "sendrecv": "permute",
    "alltoall": "all-to-all",
}


def collective_of(name: str) -> str:
    """Return the kind of collective that an instruction or a kernel is, or nothing.

    >>> collective_of("all-gather-start.3"), collective_of("ncclDevKernel_AllReduce_Sum_bf16_RING")
    ('all-gather', 'all-reduce')
    >>> collective_of("reduce_scatter.7"), collective_of("all_fusion.1")
    ('reduce-scatter', '')
    """
    if match := _NCCL.search(name):
        return _NCCL_KINDS[match[1].lower()]
    plain = name.replace("_", "-").lower()
    return next((KINDS[word] for word in KINDS if plain.startswith(word)), "")


def is_container(name: str) -> bool:
    """Return whether an instruction is a loop, a branch or a call.

    >>> is_container("while.3"), is_container("call"), is_container("callback.1")
    (True, True, False)
    """
    return name.partition(".")[0] in CONTAINERS


def is_started(name: str) -> bool:
    """Return whether an instruction only starts what runs beside others.

    >>> is_started("fusion-start.7"), is_started("fusion.7")
    (True, False)
    """
    return name.partition(".")[0].endswith("-start")


def guess(op: str, kernel: str, scope: str) -> str:
    """Return the kind of work, as of `Work.kind`, that names say an operation is.

    >>> guess("fusion.12", "nvjet_tst_128x256_64x4", "jit(step)/jvp()/while/body/dot_general")
    'matmul'
    >>> guess("fusion.3", "", "jit(step)/optimizer_update/add")
    'optimizer'
    """
    last = scope.rpartition("/")[2]
    for kind, words in _WORDS:
        for name in (kernel, op, last):
            if any(word in name.lower() for word in words):
                return kind
    return "optimizer" if phase_of(scope, "") == "update" else "elementwise"


def kernel_name(op: str) -> str:
    """Return what the kernel of a fusion is called: a GPU kernel's name has no dots or dashes.

    >>> kernel_name("loop_add_fusion.3")
    'loop_add_fusion_3'
    """
    return re.sub(r"[^\w]", "_", op)
