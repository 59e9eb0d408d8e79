"""The Program: what one device does in a step, whoever wrote it down.

The planner's partitioner writes one from a plan; a reader of compiled code can write the same.
Cost, memory, simulation and verification read nothing else. Every figure is a number or a numpy
array, and all arrays of one program broadcast together: a program is one plan or many at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Number = Any

# What collectives of weights and their gradients are for.
PARAMETER_PURPOSES = frozenset(
    {
        "weights",  # of the layers, gathered before use; their gradients scattered
        "tables",  # the same of the vocabulary
        "ends",  # the same of the other matrices before and after the layers
        "gradient reduction",  # of matrices, over devices with the same weights
        "shared gradients",  # of matrices that the tensor axis does not split
        "small gradients",  # of biases, scales and other vectors
        "updated parameters",
    }
)

# What operations are for, where an implementation may do them in another way.
ATTENTION = "softmax attention"  # in one kernel: `m` queries, `n` keys, `batch` heads
ATTENTION_GRADIENT = "softmax attention gradient"
QUERY_KEY_NORM = "query-key norm"


@dataclass(frozen=True, kw_only=True)
class Compute:
    """One compiled operation on one device, or `count` equal ones in a row.

    A matmul multiplies `[m, k]` by `[k, n]`, `batch` of them, and executes `fraction` of that
    (causal attention skips half). `matmuls` counts products of that shape (or its transposes)
    inside one fused operation, as in a flash attention kernel. Operations without a matmul have
    `matmuls` 0. Bytes are those that cross HBM after fusion; vector operations are float32 ones.
    """

    name: str
    kind: str  # "matmul", "attention", "elementwise", "optimizer", "transfer", "copy", "transpose"
    m: Number = 0
    k: Number = 0
    n: Number = 0
    batch: Number = 1
    matmuls: Number = 0
    fraction: Number = 1.0
    hbm_bytes: Number = 0
    vector_ops: Number = 0
    dtype: str = "bf16"
    count: Number = 1
    cycles: Number | None = None  # a compiler's estimate; it stands for the units' time
    # How a ring over the tensor axis cuts a matmul: "gathered" if its input comes in pieces,
    # "scattered" if its result leaves in pieces; else it runs whole beside the ring.
    ring: str = ""
    purpose: str = ""  # one of those above, or nothing
    pointwise: Number = 0  # elements of what it does by element, or of what is fused into its end
    source: str = ""  # of compiled code: file, line and function

    @property
    def flops(self) -> Number:
        """Multiply-adds of one operation, counted as two."""
        return 2.0 * self.m * self.k * self.n * self.batch * self.matmuls * self.fraction


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective over one group of devices, or `count` equal ones in a row.

    `bytes` is the size of the whole array that the group holds together: what an all-gather
    leaves on every device, what a reduce-scatter starts from, what an all-reduce sums. For
    all-to-all and permute it is what one device holds. `schedule` says what may run meanwhile:

    - "exposed": nothing;
    - "ring": the matmuls named in `partners`, cut into blocks (collective matmul), as
      `Layout.matmul_overlap` says;
    - "behind": the rest of the block that it is in (weights of the next layer, gradients of the
      last one), if the layout's switch for it is on; `switch` names that switch;
    - "started": everything up to the `Await` of its name (compiled programs).

    Planned collectives name a role of the layout. Compiled ones have the role "" and name the mesh
    axes of their group; of the axes in `parts` it takes only some members at a stride.
    """

    name: str
    kind: str  # "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "permute"
    role: str  # a role of the layout, or a joint one
    bytes: Number
    count: Number = 1
    messages: Number = 1  # separate arrays, each with its own latency
    schedule: str = "exposed"
    partners: tuple[str, ...] = ()
    switch: str = ""
    stage: str = "all"  # "torus" or "dcn": only that part of the group's path
    purpose: str = "block"  # what it is for: see PARAMETER_PURPOSES for those of weights
    mesh_axes: tuple[str, ...] = ()
    parts: tuple[tuple[str, int, int], ...] = ()  # mesh axis, members, stride
    shifts: tuple[int, ...] = ()  # of a compiled permute: members passed over, negative: back
    source: str = ""  # of compiled code: file, line and function

    @property
    def moves(self) -> str:
        """Whether it moves "parameters" (or their gradients) or "activations"."""
        return "parameters" if self.purpose in PARAMETER_PURPOSES else "activations"


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A copy between memories of one device that runs beside other work until it is awaited."""

    name: str
    hbm_bytes: Number  # read from HBM and written to it
    host_bytes: Number = 0  # to or from the host's memory
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Await:
    """The point where what was started as `name` must have ended."""

    name: str


Task = Compute | Collective | Transfer | Await


@dataclass(frozen=True, kw_only=True)
class Block:
    """Tasks that run in order, `trips` times in a step on each device."""

    name: str  # "layer forward"
    phase: str  # "forward", "backward", "update"
    trips: Number
    tasks: tuple[Task, ...]

    def computes(self) -> Iterator[Compute]:
        """Yield the compute tasks in order."""
        return (task for task in self.tasks if isinstance(task, Compute))

    def collectives(self) -> Iterator[Collective]:
        """Yield the collectives in order."""
        return (task for task in self.tasks if isinstance(task, Collective))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """HBM on one device, in bytes, by what it is for."""

    parameters: Number
    optimizer: Number
    gradients: Number
    saved_activations: Number  # kept from the forward to the backward pass, all layers
    gathered_weights: Number  # whole weights of the layers in use
    layer_workspace: Number  # live inside one layer's backward pass
    head_workspace: Number  # live in the output head and loss


@dataclass(frozen=True, kw_only=True)
class Program:
    """All that one device does in one step."""

    blocks: tuple[Block, ...]
    memory: Memory
    bubble: Number = 0.0  # pipeline: idle time as a fraction of the busy time of the layers
    offload_bytes: Number = 0  # to the host and back, per layer and pass
    warnings: tuple[str, ...] = ()
    order: tuple[int, ...] = ()  # blocks as they run, of compiled programs: places in `blocks`
    notes: dict[str, Any] = field(default_factory=dict)

    def block(self, name: str) -> Block:
        """Return the block called `name`."""
        return next(block for block in self.blocks if block.name == name)
