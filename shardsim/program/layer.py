"""One layer on one device: forward, recomputation and backward, as tasks.

A parallel block has one branch (norm, all input projections, attention beside the MLP's
activation, all output projections, one addition to the residual); a serial block has two. Each
branch with tensor parallelism gathers its input (or starts from a replicated one), keeps the wide
side where it is, and reduce-scatters its narrow output: one all-gather and one reduce-scatter per
branch forward, twice that backward. With 2-D tensor parallelism (Pope et al. 2022,
arXiv 2211.05102, section 3.2.2) the wide side is summed over and gathered from the second axis.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from shardsim.plan.layout import EMBED_SHARDED, REPLICATED, Layout, Number
from shardsim.program.attention import attention_backward, attention_forward
from shardsim.program.shapes import Shapes, Workload
from shardsim.program.tasks import Collective, Compute

Task = Compute | Collective

# Vector operations per element, counted from the usual polynomial forms: an exponential or a tanh
# is about ten multiply-adds, a norm reads its row twice.
OPS_ACTIVATION = 12.0
OPS_NORM = 8.0
OPS_ADD = 1.0
OPS_QUANTISE = 4.0


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One way from the residual stream through the block and back into it."""

    name: str
    attention: bool
    mlp: bool
    norms: int  # norms on the way, before and after


def branches(work: Workload) -> tuple[Branch, ...]:
    """Return the branches of a block in order."""
    after = 1 if work.model.post_norms else 0
    if work.model.parallel_block:
        return (Branch(name="block", attention=True, mlp=True, norms=1 + after),)
    return (
        Branch(name="attention", attention=True, mlp=False, norms=1 + after),
        Branch(name="mlp", attention=False, mlp=True, norms=1 + after),
    )


class LayerWriter:
    """Writes the tasks of one layer for one workload and layout."""

    def __init__(self, work: Workload, layout: Layout, shapes: Shapes) -> None:
        self.work = work
        self.layout = layout
        self.shapes = shapes
        self.width = work.wire_bytes
        self.tensor = layout.tensor.size
        self.sharded = np.not_equal(layout.residual, REPLICATED) & (self.tensor > 1)
        self.replicated = np.equal(layout.residual, REPLICATED) & (self.tensor > 1)

    # Building blocks.

    def matmul(
        self,
        name: str,
        m: Number,
        k: Number,
        n: Number,
        *,
        count: Number = 1,
        out_bytes: Number | None = None,
        extra_elements: Number = 0,
        vector_ops: Number = 0,
    ) -> Compute:
        """Return a matmul; `extra_elements` are read by what is fused into its end."""
        out = self.width if out_bytes is None else out_bytes
        return Compute(
            name=name,
            kind="matmul",
            m=m,
            k=k,
            n=n,
            matmuls=1,
            hbm_bytes=(m * k + k * n + extra_elements) * self.width + m * n * out,
            vector_ops=vector_ops,
            dtype=self.work.precision.compute,
            count=count,
        )

    def stream(
        self, name: str, elements: Number, passes: float, ops: float, count: Number = 1
    ) -> Compute:
        """Return an elementwise operation that moves `passes` arrays of `elements`."""
        return Compute(
            name=name,
            kind="elementwise",
            hbm_bytes=elements * passes * self.width,
            vector_ops=elements * ops,
            count=count,
        )

    def tensor_collective(
        self, name: str, kind: str, count: Number, partners: Iterable[str] = ()
    ) -> Collective:
        """Return a collective of the residual stream over the tensor axis."""
        partners = tuple(partners)
        return Collective(
            name=name,
            kind=kind,
            role="tensor",
            bytes=self.shapes.tokens * self.shapes.embed * self.width,
            count=count,
            schedule="ring" if partners else "exposed",
            partners=partners,
        )

    def second_axis(self, name: str, kind: str, width: Number, count: Number = 1) -> Collective:
        """Return a collective of the wide side over the second tensor axis."""
        return Collective(
            name=name,
            kind=kind,
            role="tensor2",
            bytes=self.shapes.tokens * width * self.width,
            count=count * (self.layout.tensor2.size > 1),
        )

    def norm(self, name: str, branch: Branch, passes: float, count: Number = 1) -> list[Task]:
        """Return the norms of a branch, with the sum of their statistics if embed is split."""
        elements = self.shapes.residual
        split = np.equal(self.layout.residual, EMBED_SHARDED) & (self.tensor > 1)
        statistics = Collective(
            name=f"{name} statistics",
            kind="all-reduce",
            role="tensor",
            bytes=self.shapes.tokens * 2.0 * 4.0,
            count=count * branch.norms * split,
        )
        return [
            self.stream(name, elements, passes * branch.norms, OPS_NORM, count),
            statistics,
        ]

    def quantise(self, name: str, elements: Number) -> list[Task]:
        """Return the cast of a matmul's input to 8 bits: read for its scale, read, written."""
        if self.work.compute_bytes > 1:
            return []
        return [self.stream(f"quantise {name}", elements, 2.5, OPS_QUANTISE)]

    # The layer.

    def projections(self, branch: Branch) -> dict[str, Number]:
        """Return the output widths of the branch's input projections, fused if they are."""
        shapes = self.shapes
        if branch.attention and branch.mlp and self.work.fused_projections:
            return {"qkv+mlp_in": shapes.qkv + shapes.mlp_in}
        widths: dict[str, Number] = {}
        if branch.attention:
            widths["qkv"] = shapes.qkv
        if branch.mlp:
            widths["mlp_in"] = shapes.mlp_in
        return widths

    def outputs(self, branch: Branch) -> dict[str, Number]:
        """Return the input widths of the branch's output projections, fused if they are."""
        shapes = self.shapes
        if branch.attention and branch.mlp and self.work.fused_projections:
            return {"attention_out+mlp_out": shapes.q + shapes.hidden}
        widths: dict[str, Number] = {}
        if branch.attention:
            widths["attention_out"] = shapes.q
        if branch.mlp:
            widths["mlp_out"] = shapes.hidden
        return widths

    def hidden_ops(self, names: str) -> Number:
        """Return the vector operations of the activation fused into the MLP's projection."""
        if "mlp_in" not in names:
            return 0.0
        return OPS_ACTIVATION * self.shapes.tokens * self.shapes.hidden

    def middle(self, branch: Branch, suffix: str, keeps_context: Number) -> list[Task]:
        """Return attention and gating; attention runs `1 - keeps_context` times."""
        shapes = self.shapes
        tasks: list[Task] = []
        if branch.attention:
            tasks += self.query_key_tasks(suffix, passes=2.0)
            tasks += attention_forward(self.work, self.layout, shapes, suffix, keeps_context)
        if branch.mlp and shapes.gates == 2:
            # The product with the gate is fused into the second projection, which reads the first.
            elements = shapes.tokens * shapes.hidden / shapes.split2
            tasks.append(self.stream(f"gate{suffix}", elements, 1.0, OPS_ADD))
        return tasks

    def query_key_tasks(self, suffix: str, passes: float) -> list[Task]:
        """Return QK-norm and rotary embedding: each reads and writes queries and keys."""
        model = self.work.model
        rounds = int(model.qk_norm) + int(model.positions == "rotary")
        if not rounds:
            return []
        shapes = self.shapes
        elements = shapes.tokens * (shapes.q + shapes.kv / 2.0) / shapes.split2
        return [self.stream(f"queries and keys{suffix}", elements, passes * rounds, OPS_NORM)]

    def forward(self) -> list[Task]:
        """Return the forward pass of one layer."""
        tasks: list[Task] = []
        for branch in branches(self.work):
            tasks += self.branch_forward(branch)
        return tasks

    def branch_forward(self, branch: Branch) -> list[Task]:
        shapes = self.shapes
        ins, outs = self.projections(branch), self.outputs(branch)
        tasks = self.norm(f"{branch.name} norm", branch, 2.0)
        tasks.append(
            self.tensor_collective(f"gather {branch.name} input", "all-gather", self.sharded, ins)
        )
        tasks += self.quantise(f"{branch.name} input", shapes.tokens * shapes.embed)
        for name, width in ins.items():
            ops = self.hidden_ops(name)
            tasks.append(self.matmul(name, shapes.tokens, shapes.embed, width, vector_ops=ops))
        tasks.append(
            self.second_axis(f"sum {branch.name} hidden", "reduce-scatter", sum(ins.values()))
        )
        tasks += self.middle(branch, "", False)
        tasks.append(
            self.second_axis(f"gather {branch.name} hidden", "all-gather", sum(outs.values()))
        )
        tasks += self.quantise(f"{branch.name} hidden", shapes.tokens * sum(outs.values()))
        for name, width in outs.items():
            tasks.append(self.matmul(name, shapes.tokens, width, shapes.embed))
        tasks.append(
            self.tensor_collective(
                f"scatter {branch.name} output", "reduce-scatter", self.sharded, outs
            )
        )
        tasks.append(
            self.tensor_collective(f"sum {branch.name} output", "all-reduce", self.replicated)
        )
        # The addition reads the residual and the branch; its result was counted by the matmul.
        tasks.append(self.stream(f"{branch.name} residual", shapes.residual, 2.0, OPS_ADD))
        return tasks

    def backward(self) -> list[Task]:
        """Return recomputation and backward pass of one layer."""
        tasks: list[Task] = []
        for branch in reversed(branches(self.work)):
            tasks += self.branch_recompute(branch)
            tasks += self.branch_backward(branch)
        return tasks

    def branch_recompute(self, branch: Branch) -> list[Task]:
        """Return what the backward pass needs and the forward pass did not keep."""
        shapes, layout = self.shapes, self.layout
        again = {
            "qkv": np.logical_not(layout.keep_qkv),
            "mlp_in": np.logical_not(layout.keep_mlp_hidden),
        }
        lost = np.logical_not(layout.keep_rest)
        tasks = self.norm(f"{branch.name} norm again", branch, 2.0, lost)
        # The input is needed whole for the weight gradients, kept or not.
        wgrads = [f"{name} dW" for name in self.projections(branch)]
        tasks.append(
            self.tensor_collective(
                f"gather {branch.name} input again", "all-gather", self.sharded, wgrads
            )
        )
        widths = {"qkv": shapes.qkv * branch.attention, "mlp_in": shapes.mlp_in * branch.mlp}
        for name in self.separate(branch):
            tasks.append(
                self.matmul(
                    f"{name} again",
                    shapes.tokens,
                    shapes.embed,
                    widths[name],
                    count=again[name],
                    vector_ops=self.hidden_ops(name),
                )
            )
            tasks.append(
                self.second_axis(f"sum {name} again", "reduce-scatter", widths[name], again[name])
            )
        if branch.attention:
            tasks += self.query_key_tasks(" again", passes=2.0)
            tasks += attention_forward(
                self.work, layout, shapes, " again", layout.keep_context, layout.keep_rest
            )
        if branch.attention and not branch.mlp:
            # A serial block needs the residual between its branches.
            redo = np.logical_not(layout.keep_attention_output)
            name = "attention_out again"
            tasks.append(self.matmul(name, shapes.tokens, shapes.q, shapes.embed, count=redo))
            for kind, where in (("reduce-scatter", self.sharded), ("all-reduce", self.replicated)):
                partners = (name,) if kind == "reduce-scatter" else ()
                tasks.append(
                    self.tensor_collective(
                        f"{kind} attention output again", kind, where * redo, partners
                    )
                )
        return tasks

    def separate(self, branch: Branch) -> list[str]:
        """Return the branch's input projections one by one."""
        return ["qkv"] * branch.attention + ["mlp_in"] * branch.mlp

    def branch_backward(self, branch: Branch) -> list[Task]:
        shapes = self.shapes
        ins, outs = self.projections(branch), self.outputs(branch)
        grad_bytes = self.work.reduce_bytes
        tasks: list[Task] = [
            self.tensor_collective(
                f"gather {branch.name} output gradient",
                "all-gather",
                self.sharded,
                [f"{name} dx" for name in outs],
            )
        ]
        tasks += self.quantise(f"{branch.name} output gradient", shapes.tokens * shapes.embed)
        for name, width in outs.items():
            # The activation's derivative is fused into this matmul's end and reads its input.
            hidden = shapes.tokens * shapes.hidden if "mlp_out" in name else 0.0
            tasks.append(
                self.matmul(
                    f"{name} dx",
                    shapes.tokens,
                    shapes.embed,
                    width,
                    extra_elements=hidden,
                    vector_ops=OPS_ACTIVATION * hidden,
                )
            )
        tasks.append(
            self.second_axis(
                f"sum {branch.name} hidden gradient", "reduce-scatter", sum(outs.values())
            )
        )
        tasks.append(
            self.second_axis(f"gather {branch.name} hidden again", "all-gather", sum(outs.values()))
        )
        for name, width in outs.items():
            tasks.append(
                self.matmul(f"{name} dW", width, shapes.tokens, shapes.embed, out_bytes=grad_bytes)
            )
        if branch.mlp and shapes.gates == 2:
            elements = shapes.tokens * shapes.hidden / shapes.split2
            tasks.append(self.stream("gate gradient", elements, 3.0, 4 * OPS_ADD))
        if branch.attention:
            tasks += attention_backward(self.work, self.layout, shapes)
            tasks += self.query_key_tasks(" gradient", passes=3.0)
        tasks.append(
            self.second_axis(
                f"gather {branch.name} hidden gradient", "all-gather", sum(ins.values())
            )
        )
        tasks += self.quantise(f"{branch.name} hidden gradient", shapes.tokens * sum(ins.values()))
        for name, width in ins.items():
            tasks.append(self.matmul(f"{name} dx", shapes.tokens, width, shapes.embed))
        tasks.append(
            self.tensor_collective(
                f"scatter {branch.name} input gradient",
                "reduce-scatter",
                self.sharded,
                [f"{name} dx" for name in ins],
            )
        )
        tasks.append(
            self.tensor_collective(
                f"sum {branch.name} input gradient", "all-reduce", self.replicated
            )
        )
        for name, width in ins.items():
            tasks.append(
                self.matmul(f"{name} dW", shapes.embed, shapes.tokens, width, out_bytes=grad_bytes)
            )
        tasks += self.bias_tasks(branch)
        tasks += self.norm(f"{branch.name} norm gradient", branch, 4.0)
        return tasks

    def bias_tasks(self, branch: Branch) -> list[Task]:
        """Return the sums over tokens that bias gradients are; each reads its array once more."""
        biases = self.work.model.biases
        shapes = self.shapes
        tasks: list[Task] = []
        for name, wanted, elements in (
            ("qkv", biases.qkv and branch.attention, shapes.tokens * shapes.qkv),
            (
                "attention_out",
                biases.attention_output and branch.attention,
                shapes.tokens * shapes.embed,
            ),
            (
                "mlp",
                biases.mlp and branch.mlp,
                shapes.tokens * (shapes.mlp_in + shapes.embed),
            ),
            ("norm", biases.norm, shapes.residual * branch.norms),
        ):
            if wanted:
                tasks.append(self.stream(f"{name} bias gradient", elements, 1.0, OPS_ADD))
        return tasks
