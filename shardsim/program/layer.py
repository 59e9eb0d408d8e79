"""One layer on one device: forward, recomputation and backward, as tasks.

A parallel block has one branch (norm, all input projections, attention beside the MLP's
activation, all output projections, one addition to the residual); a serial block has two. Each
branch with tensor parallelism gathers its input (or starts from a replicated one), keeps the wide
side where it is, and reduce-scatters its narrow output: one all-gather and one reduce-scatter per
branch forward, twice that backward. With 2-D tensor parallelism (Pope et al. 2022,
arXiv 2211.05102, section 3.2.2) the wide side is summed over and gathered from the second axis.
"""

from __future__ import annotations

import numpy as np

from shardsim.plan.layout import Number
from shardsim.program.attention import attention_backward, attention_forward
from shardsim.program.branches import Branch, BranchWriter, branches
from shardsim.program.writer import OPS_ADD, Task


class LayerWriter(BranchWriter):
    """Writes the tasks of one layer."""

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
            tasks.append(
                self.matmul(
                    name,
                    shapes.tokens,
                    shapes.embed,
                    width,
                    pointwise=self.activated(name),
                    ring="gathered",
                )
            )
        tasks += self.hidden_sums(
            f"sum {branch.name} hidden", "reduce-scatter", sum(ins.values()), self.kv(branch)
        )
        tasks += self.middle(branch, "", False)
        tasks.append(
            self.second_axis(f"gather {branch.name} hidden", "all-gather", sum(outs.values()))
        )
        tasks += self.quantise(f"{branch.name} hidden", shapes.tokens * sum(outs.values()))
        for name, width in outs.items():
            tasks.append(self.matmul(name, shapes.tokens, width, shapes.embed, ring="scattered"))
        for result in self.results(branch):
            tasks += self.output_sums(f"{result} output", self.partners(result, outs))
        # The addition reads the residual and the branch; its result was counted by the matmul.
        tasks.append(self.stream(f"{branch.name} residual", shapes.residual, 2.0, OPS_ADD))
        return tasks

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
        beside = [f"{name} again" for name in self.separate(branch)]
        beside += [f"{name} dW" for name in self.projections(branch)]
        tasks.append(
            self.tensor_collective(
                f"gather {branch.name} input again", "all-gather", self.sharded, beside
            )
        )
        # Queries and keys are kept as they enter attention, and only a norm's gradient needs them
        # from before it; values enter it as they are.
        values = layout.keep_rest & (not self.work.model.qk_norm)
        kv = np.where(values, shapes.kv / 2.0, shapes.kv)
        widths = {"qkv": kv + np.where(values, 0.0, shapes.q), "mlp_in": shapes.mlp_in}
        kvs = {"qkv": kv, "mlp_in": 0}
        for name in self.separate(branch):
            tasks.append(
                self.matmul(
                    f"{name} again",
                    shapes.tokens,
                    shapes.embed,
                    widths[name],
                    count=again[name],
                    pointwise=self.activated(name),
                    ring="gathered",
                )
            )
            tasks += self.hidden_sums(
                f"sum {name} again", "reduce-scatter", widths[name], kvs[name], again[name]
            )
        if branch.attention:
            tasks += self.query_key_tasks(" again", passes=2.0)
            tasks += attention_forward(
                self.work, layout, shapes, " again", layout.keep_context, layout.keep_rest
            )
        for result, width, lost in self.results_again(branch):
            name = f"{result}_out again"
            tasks.append(
                self.matmul(name, shapes.tokens, width, shapes.embed, count=lost, ring="scattered")
            )
            tasks += self.output_sums(f"{result} output again", (name,), lost)
        return tasks

    def results_again(self, branch: Branch) -> list[tuple[str, Number, Number]]:
        """Return (result, input width, whether lost) of the results that the backward pass needs.

        A serial block needs the residual between its branches, a norm after the branch its input.
        """
        layout, shapes = self.layout, self.shapes
        post_norms = self.work.model.post_norms
        needed: list[tuple[str, Number, Number]] = []
        if branch.attention and (post_norms or not branch.mlp):
            needed.append(("attention", shapes.q, np.logical_not(layout.keep_attention_output)))
        if branch.mlp and post_norms:
            needed.append(("mlp", shapes.hidden, np.logical_not(layout.keep_mlp_output)))
        return needed

    def branch_backward(self, branch: Branch) -> list[Task]:
        shapes = self.shapes
        ins, outs = self.projections(branch), self.outputs(branch)
        grad_bytes = self.work.reduce_bytes
        tasks: list[Task] = [
            self.tensor_collective(
                f"gather {result} output gradient",
                "all-gather",
                self.sharded,
                self.partners(result, outs, " dx"),
            )
            for result in self.results(branch)
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
                    pointwise=hidden,
                    ring="gathered",
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
        tasks += self.hidden_sums(
            f"gather {branch.name} hidden gradient",
            "all-gather",
            sum(ins.values()),
            self.kv(branch),
        )
        tasks += self.quantise(f"{branch.name} hidden gradient", shapes.tokens * sum(ins.values()))
        for name, width in ins.items():
            tasks.append(
                self.matmul(f"{name} dx", shapes.tokens, width, shapes.embed, ring="scattered")
            )
        tasks.append(
            self.tensor_collective(
                f"scatter {branch.name} input gradient",
                "reduce-scatter",
                self.sharded,
                [f"{name} dx" for name in ins],
            )
        )
        # Where every member holds the whole stream, each result's gradient is summed instead.
        for result in self.results(branch):
            tasks.append(
                self.tensor_collective(
                    f"sum {result} input gradient", "all-reduce", self.replicated
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
