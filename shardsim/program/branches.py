"""The branches of a block: what each projects, and the tasks that forward and backward share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shardsim.plan.layout import Number
from shardsim.program.shapes import Workload
from shardsim.program.tasks import QUERY_KEY_NORM
from shardsim.program.writer import OPS_NORM, Task, Writer


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
        return (Branch(name="block", attention=True, mlp=True, norms=1 + 2 * after),)
    return (
        Branch(name="attention", attention=True, mlp=False, norms=1 + after),
        Branch(name="mlp", attention=False, mlp=True, norms=1 + after),
    )


class BranchWriter(Writer):
    """Writes the parts of a branch."""

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
        if self.work.fused_projections and len(self.results(branch)) < len(self.separate(branch)):
            return {"attention_out+mlp_out": shapes.q + shapes.hidden}
        widths: dict[str, Number] = {}
        if branch.attention:
            widths["attention_out"] = shapes.q
        if branch.mlp:
            widths["mlp_out"] = shapes.hidden
        return widths

    def separate(self, branch: Branch) -> list[str]:
        """Return the branch's input projections one by one."""
        return ["qkv"] * branch.attention + ["mlp_in"] * branch.mlp

    def results(self, branch: Branch) -> tuple[str, ...]:
        """Return what the branch adds to the residual stream; each is summed over tensor once.

        Norms after attention and MLP need both results of a parallel block, not only their sum.
        """
        if branch.attention and branch.mlp and self.work.model.post_norms:
            return ("attention", "mlp")
        return (branch.name,)

    def partners(self, result: str, outs: Iterable[str], suffix: str = "") -> list[str]:
        """Return the output projections that make one of `results`."""
        mine = {"attention": ("attention_out",), "mlp": ("mlp_out",)}.get(result, tuple(outs))
        return [f"{name}{suffix}" for name in outs if name in mine]

    def kv(self, branch: Branch) -> Number:
        """Return the width of keys and values among the branch's input projections."""
        return self.shapes.kv if branch.attention else 0

    def norm(self, name: str, branch: Branch, passes: float, count: Number = 1) -> list[Task]:
        """Return the norms of a branch, with the sum of their statistics if embed is split."""
        return [
            self.stream(name, self.shapes.residual, passes * branch.norms, OPS_NORM, count),
            self.norm_statistics(name, count * branch.norms),
        ]

    def hidden_sums(
        self, name: str, kind: str, width: Number, kv: Number, count: Number = 1
    ) -> list[Task]:
        """Return the collectives over the second tensor axis of input projections of `width`.

        `kind` is "reduce-scatter" forward, "all-gather" for the gradient. Where members of the
        axis share a key-value head, the `kv` of keys and values are summed on all of them instead.
        """
        model, shared = self.work.model, kv * self.shapes.kv_summed
        tasks: list[Task] = [self.second_axis(name, kind, width - shared, count)]
        if model.kv_heads < model.heads and not (isinstance(kv, int) and kv == 0):
            tasks.append(self.second_axis(f"{name}, shared heads", "all-reduce", shared, count))
        return tasks

    def output_sums(self, what: str, partners: Iterable[str], count: Number = 1) -> list[Task]:
        """Return the sum of an output over tensor: scattered if the residual stream is split."""
        return [
            self.tensor_collective(
                f"scatter {what}", "reduce-scatter", self.sharded * count, partners
            ),
            self.tensor_collective(f"sum {what}", "all-reduce", self.replicated * count),
        ]

    def activated(self, names: str) -> Number:
        """Return the elements of the activation that is fused into the MLP's projection."""
        return self.shapes.tokens * self.shapes.hidden if "mlp_in" in names else 0.0

    def query_key_tasks(self, suffix: str, passes: float) -> list[Task]:
        """Return QK-norm and rotary embedding: each reads and writes queries and keys."""
        model = self.work.model
        rounds = int(model.qk_norm) + int(model.positions == "rotary")
        if not rounds:
            return []
        shapes = self.shapes
        elements = shapes.tokens * (shapes.q + shapes.kv / 2.0) / shapes.split2
        purpose = QUERY_KEY_NORM if model.qk_norm else ""
        name = f"queries and keys{suffix}"
        return [self.stream(name, elements, passes * rounds, OPS_NORM, purpose=purpose)]
