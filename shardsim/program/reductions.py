"""What follows the last microbatch: gradients summed over replicas, and the optimizer's update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from shardsim.graph.arrays import Array
from shardsim.graph.derive import Leaf
from shardsim.graph.place import CONTEXT
from shardsim.model import Model
from shardsim.plan.layout import Layout, Number
from shardsim.plan.optimizer import state_bytes
from shardsim.plan.split import state_apart, stored_elements
from shardsim.program.blocks import Run
from shardsim.program.lower import VECTOR_GRADIENT_BYTES
from shardsim.program.members import PartOf
from shardsim.program.once import awaited
from shardsim.program.schedule import Await, Block, Copy, Start
from shardsim.program.shapes import Workload
from shardsim.program.sizes import Sizes, role_of
from shardsim.program.tasks import Collective, Compute, Task, repeated

# Vector operations of one parameter in an update with two moments.
OPS_UPDATE = 16.0

REPLICAS = ("data", "expert", *CONTEXT)  # devices with the same weights and other data


def gradient_reductions(
    layout: Layout, members: Sequence[PartOf], runs: Sequence[Run]
) -> tuple[Block, ...]:
    """Return the sums of gradients over devices that hold the same weights.

    They run once a step, after the last microbatch: for each round of layers of each stack, and for
    what stands before and after them. Where the data axis splits the optimizer's state (ZeRO-1)
    each matrix is reduce-scattered over it before the update, and the updated parameters are
    gathered after it in the format in which they are stored.
    """
    stacks: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        if run.trained:
            stacks.setdefault((run.part, run.first), []).append(run)
    writers = [_Reductions(one.work, layout, one.sizes) for one in members]
    vectors: list[_Vectors] = []
    blocks = []
    work = members[-1].work
    # Fused, what goes into a block is one array and what comes out of it another.
    most = 2 if work.fused_projections else None
    for number, ((of, _), same) in enumerate(stacks.items()):
        rounds, tasks = sum(run.rounds for run in same), []
        one, writer = members[of], writers[of]
        for place, layer in same[0].layers:
            derived = one.derived.layers[place]
            vectors.append((writer, derived.leaves, rounds * layer.times))
            tasks += repeated(writer.matrices(derived.leaves, most), layer)
            tasks += repeated(writer.still(derived.still), layer)
        title = f", stack {number + 1}" if len(stacks) > 1 else ""
        blocks.append(
            Block(
                name=f"gradient reduction{title}",
                phase="reduction",
                trips=rounds,
                tasks=tuple(awaited(tasks, layout)),
                of=tuple(number for number, run in enumerate(runs) if run in same),
            )
        )
    matrices: list[Task] = []
    for one, writer in zip(members, writers, strict=True):
        ends = one.derived.ends.leaves
        if np.any(layout.lockstep):  # all stages have the ends, and one of them their gradients
            ends = [replace(leaf, partial=leaf.partial | {"pipeline"}) for leaf in ends]
        matrices += repeated(writer.matrices(ends), one.as_layer)
        vectors.append((writer, ends, 1))
    return (
        *blocks,
        Block(
            name="end gradient reduction",
            phase="reduction",
            trips=1,
            tasks=tuple(awaited((*matrices, *writers[-1].vectors(vectors)), layout)),
        ),
    )


# What the parts of a reduction are called: inside a slice (or node), and between them.
WHERE = {"all": "all", "torus": "inside", "dcn": "between"}


class _Reductions:
    def __init__(self, work: Workload, layout: Layout, sizes: Sizes) -> None:
        self.work = work
        self.layout = layout
        self.sizes = sizes
        # All matrices have an embed dimension of one width: the state of all is split or of none
        # (`split.dimension` has experts' follow the others').
        self.zero = np.asarray(state_apart(work.model, layout), dtype=bool)
        self.by_data = np.where(self.zero, layout.data.size, 1)

    def matrices(self, leaves: Iterable[Leaf], most: int | None = None) -> list[Task]:
        """Return the sums of the gradients of matrices and tables, those alike in one go, as `most`
        messages."""
        groups: dict[frozenset[str], list[Array]] = {}
        for leaf in leaves:
            if leaf.array.weight != "vector":
                groups.setdefault(leaf.partial, []).append(leaf.array)
        whole: dict[str, tuple[Number, int]] = {}
        apart: dict[str, tuple[Number, int]] = {}
        for axes, arrays in groups.items():
            elements = sum(self.sizes.stored(array) for array in arrays)
            for sums, role in (
                (whole, role_of(axes & set(REPLICAS))),
                (apart, role_of(axes - set(REPLICAS))),
            ):
                if role:
                    before = sums.get(role, (0.0, 0))
                    messages = before[1] + len(arrays)
                    sums[role] = (before[0] + elements, min(messages, most or messages))
        tasks: list[Task] = []
        for role, (elements, messages) in whole.items():
            tasks += self._replicas(role, elements, messages)
        for role, (elements, messages) in apart.items():
            tasks.append(
                self._sum(
                    "all-reduce", role, elements / self.by_data, messages, 1, "shared gradients"
                )
            )
        return tasks

    def _replicas(self, role: str, elements: Number, messages: int) -> list[Task]:
        """Return the sums over devices with the same weights and other data."""
        zero, data = self.zero, "data" in role.split("+")
        tasks: list[Task] = []
        for stage, switch in (("torus", "gradients_overlap"), ("dcn", "dcn_overlap")):
            tasks.append(
                self._sum("all-reduce", role, elements, messages, ~zero, stage=stage, switch=switch)
            )
            if not data:
                continue
            tasks += [
                self._sum(
                    "reduce-scatter", "data", elements, messages, zero, stage=stage, switch=switch
                ),
                self._gather("updated parameters", elements, messages, stage),
            ]
        if role != "data":
            rest = role_of(set(role.split("+")) - {"data"})
            tasks.append(self._sum("all-reduce", rest, elements / self.by_data, messages, zero))
        return tasks

    def still(self, leaves: Iterable[Leaf]) -> list[Task]:
        """Return the gathers of updated matrices that have no gradient: an optimizer whose state
        the data axis splits updates a part of them all the same."""
        arrays = [
            leaf.array
            for leaf in leaves
            if leaf.array.weight != "vector" and "data" in leaf.partial
        ]
        if not arrays:
            return []
        elements = sum(self.sizes.stored(array) for array in arrays)
        what = "updated parameters without gradients"
        return [self._gather(what, elements, len(arrays), stage) for stage in ("torus", "dcn")]

    def _gather(self, what: str, elements: Number, messages: int, stage: str) -> Collective:
        return Collective(
            name=f"gather {what} over {stage}",
            kind="all-gather",
            role="data",
            bytes=elements * self.work.parameter_bytes,
            count=self.zero & self.sizes.several(["data"]),
            messages=messages,
            stage=stage,
            purpose="updated parameters",
        )

    def _sum(
        self,
        kind: str,
        role: str,
        elements: Number,
        messages: int,
        wanted: Number,
        purpose: str = "gradient reduction",
        stage: str = "all",
        switch: str = "gradients_overlap",
    ) -> Collective:
        return Collective(
            name=f"{kind} {purpose} over {role}, {WHERE[stage]}",
            kind=kind,
            role=role,
            bytes=elements * self.work.reduce_bytes,
            count=wanted * np.greater(self.layout.role(role).size, 1),
            messages=messages,
            schedule="behind",
            switch=switch,
            stage=stage,
            purpose=purpose,
        )

    def vectors(self, parts: Sequence[_Vectors]) -> list[Task]:
        """Return the sums of the gradients of vectors, over all devices that do not split them: a
        compiler makes one message of them."""
        sums: dict[str, Number] = {}
        for writer, leaves, times in parts:
            for leaf in leaves:
                if leaf.array.weight != "vector":
                    continue
                stored = writer.sizes.stored(leaf.array) * times
                if leaf.array.name == one_gradient(writer.work.model):
                    stored = stored * np.greater(self.layout.microbatches, 1)
                role = role_of(leaf.partial)
                sums[role] = sums.get(role, 0.0) + stored
        return [
            Collective(
                name=f"sum small gradients over {role}",
                kind="all-reduce",
                role=role,
                bytes=elements * VECTOR_GRADIENT_BYTES,
                count=np.greater(elements, 0) & (self.layout.role(role).size > 1),
                schedule="behind",
                switch="gradients_overlap",
                purpose="small gradients",
            )
            for role, elements in sums.items()
        ]


# Leaves of a part, and how often a step has them.
_Vectors = tuple[_Reductions, Iterable[Leaf], Number]


def one_gradient(model: Model) -> str:
    """Return the bias whose gradient a compiler does not compute: it is another's.

    Two biases of a parallel block are added to one sum; the compiler sees that their gradients are
    the same, unless they add up over microbatches first.
    """
    added = model.parallel_block and model.biases.attention_output and not model.post_norms
    return "mlp_out_bias" if added else ""


def update(work: Workload, layout: Layout) -> Block:
    """Return the optimizer's update: HBM traffic of parameters, gradients and state."""
    weights = work.model.trained_tensors
    elements = stored_elements(weights, layout, state=True)
    widths = work.state_element_bytes, work.master_bytes
    state = state_bytes(work.optimizer, weights, layout, *widths)
    # Beside weights of the optimizer's own, which are state, parameters are only written.
    passes = 1.0 if work.master_bytes else 2.0
    copies = []  # one's beside others' update
    if work.offload_optimizer:
        copies.append(_both_ways("optimizer state", state))
    if work.offload_parameters:
        fetched = [tensor for tensor in weights if tensor.fetched]
        stored = stored_elements(fetched, layout) * work.parameter_bytes
        copies.append(_both_ways("parameters", stored))
    work_of_it = Compute(
        name="optimizer update",
        kind="optimizer",
        hbm_bytes=elements * (passes * work.parameter_bytes + work.gradient_bytes) + 2.0 * state,
        vector_ops=elements * OPS_UPDATE,
    )
    ahead = (Start(task=copy) for copy in copies)
    ended = (Await(name=copy.name) for copy in copies)
    return Block(name="update", phase="update", trips=1, tasks=(*ahead, work_of_it, *ended))


def _both_ways(moves: str, size: Number) -> Copy:
    """Return the copy of what is updated from the host's memory, and back to it."""
    return Copy(name=f"fetch {moves}, and offload them", host_bytes=2.0 * size, moves=moves)
