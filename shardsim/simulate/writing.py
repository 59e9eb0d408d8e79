"""A block of the Program as the operations that a chip runs in order.

The same rules as in `cost/price.py`: "exposed" collectives stop the chip; "ring" ones are cut
into hops beside blocks of their matmuls where the compiler's test says that it pays; of those
"behind", gathers start one layer ahead and scatters are awaited one layer later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from shardsim.cost.collectives import collective_s, sent_bytes
from shardsim.cost.costs import Costs
from shardsim.cost.network import Group
from shardsim.cost.overlap import BIDIRECTIONAL, ring_matmul_s
from shardsim.plan.layout import EMBED_SHARDED, Layout
from shardsim.program.rings import ring_block
from shardsim.program.tasks import Block, Collective, Compute, Program
from shardsim.simulate.operations import Host, Op, Ring, Spec, Start, Sync, Unit, Work


class Writer:
    """Writes blocks down as units, and notes which legs each role needs for them."""

    def __init__(
        self, costs: Costs, layout: Layout, program: Program, links: Mapping[str, Group]
    ) -> None:
        self.costs = costs
        self.layout = layout
        self.program = program
        self.links = links
        self.legs: dict[str, set[str]] = {}
        self.reductions: dict[str, tuple[Spec, ...]] = {}

    def unit(self, block: Block) -> Unit:
        """Return one trip through `block`."""
        ops: list[Op] = []
        prefetch: list[Spec] = []
        times = {
            work.name: float(self.costs.operation(work).total_s * work.count)
            for work in block.computes()
        }
        rings, inside = self._rings(block, times)
        host = self._host(block)
        if host is not None:
            ops.append(host)
        run: list[tuple[str, float]] = []

        def flush() -> None:
            if run:
                ops.append(Work(parts=tuple(run)))
                run.clear()

        for task in block.tasks:
            if isinstance(task, Compute):
                if task.name in rings:
                    flush()
                    ops.append(rings[task.name])
                elif task.name not in inside and times[task.name] > 0:
                    run.append((task.name, times[task.name]))
                continue
            if not isinstance(task, Collective):  # only compiled programs have others
                continue
            spec = self.spec(task)
            if spec is None or task.name in inside:
                continue
            behind = task.schedule == "behind" and bool(getattr(self.layout, task.switch))
            if behind and block.phase == "reduction":
                self.reductions[block.name] = (*self.reductions.get(block.name, ()), spec)
            elif behind and task.kind == "all-gather":
                prefetch.append(spec)
            else:
                flush()
                ops.append(Start(spec=spec) if behind else Sync(spec=spec))
        flush()
        return Unit(name=block.name, phase=block.phase, ops=tuple(ops), prefetch=tuple(prefetch))

    def spec(self, task: Collective) -> Spec | None:
        """Return a collective as numbers; None where it does not run."""
        group = self.links[task.role]
        repeat = int(task.count)
        total = float(task.bytes)
        moved = float(sent_bytes(task.kind, group, total, task.stage))
        if repeat == 0 or moved == 0:
            return None
        self.legs.setdefault(task.role, set()).add(f"{task.kind}@{task.stage}")
        alone = collective_s(task.kind, group, total, task.messages, task.stage)
        return Spec(
            name=task.name,
            kind=task.kind,
            role=task.role,
            bytes=total,
            messages=float(task.messages),
            stage=task.stage,
            repeat=repeat,
            moves=task.moves,
            sent_bytes=moved,
            alone_s=float(alone),
        )

    def _rings(self, block: Block, times: dict[str, float]) -> tuple[dict[str, Ring], set[str]]:
        """Return the rings of a block by the matmul in whose place they run, and all names that
        they stand for. A gather's ring runs where its first matmul was, a scatter's at the last.
        """
        rings: dict[str, Ring] = {}
        inside: set[str] = set()
        tasks = {work.name: work for work in block.computes()}
        for task in block.collectives():
            spec = self.spec(task) if task.schedule == "ring" else None
            if spec is None:
                continue
            names = [
                work.name
                for work in block.computes()
                if work.name in task.partners and times[work.name] > 0
            ]
            whole = sum(times[name] for name in names)
            size = int(self.links[task.role].size)
            embed = self.layout.residual == EMBED_SHARDED
            blocks = [ring_block(tasks[name], size, embed) for name in names]
            block_s = sum(float(self.costs.operation(part).total_s * part.count) for part in blocks)
            made = ring_matmul_s(
                group=self.links[task.role],
                total_bytes=spec.bytes,
                matmul_s=whole,
                block_s=block_s,
                collective_s=spec.alone_s,
                mode=self.layout.matmul_overlap,
            )
            if not names or not bool(made.decomposed):
                continue
            sent = float(made.hops) * spec.bytes / size
            cut = replace(spec, sent_bytes=sent)
            ring = self._ring(cut, whole, block_s, size, " + ".join(names))
            rings[names[0] if task.kind == "all-gather" else names[-1]] = ring
            inside.update(names)
            inside.add(task.name)
            self.legs[task.role] |= {"ring+", "closing+", ring.leg}
        return rings, inside

    def _ring(self, spec: Spec, whole_s: float, block_s: float, size: int, partners: str) -> Ring:
        both = int(self.layout.matmul_overlap) == BIDIRECTIONAL and size % 4 == 0
        gather = spec.kind == "all-gather"
        return Ring(
            spec=spec,
            block_s=block_s,
            blocks=2 if both else 1,
            rounds=size // 2 if both else size,
            leg="ring+-" if both else "ring+",
            hop_bytes=spec.bytes / size,
            before=both and gather,
            after=both and not gather,
            beside_last=both,
            whole_s=whole_s,
            partners=partners,
        )

    def _host(self, block: Block) -> Host | None:
        moved = float(np.max(self.program.offload_bytes))
        if moved == 0 or block.name not in ("layer forward", "layer backward"):
            return None
        name = "offload activations" if block.phase == "forward" else "fetch activations"
        return Host(name=name, time_s=float(moved / self.costs.host_bytes_per_s), bytes=moved)
