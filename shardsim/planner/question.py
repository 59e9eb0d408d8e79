"""What a search is asked, checked, and a look at what fits of slices that are alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardsim.errors import PlanError, expect, nearest
from shardsim.machine import Machine
from shardsim.memory import keep_freed_memory
from shardsim.model import Model
from shardsim.plan.lengths import row_tokens
from shardsim.plan.optimizer import OPTIMIZERS
from shardsim.plan.plan import ATTENTION, OP_COSTS
from shardsim.plan.precision import Precision, check_multiplied
from shardsim.planner.bounds import BestLines
from shardsim.planner.fixed import FLAGS, ROOM, Fixed
from shardsim.planner.rank import OBJECTIVES, Ranking
from shardsim.planner.space import parts
from shardsim.program.shapes import Workload

CANDIDATES = 10  # so many plans at least are given their free HBM before they are ranked again

Progress = Callable[[int, int], None]
Look = tuple[Ranking, bool]  # of one slice; whether no interrupt ended it
Looked = Mapping[tuple[int, str], Look]  # by identities of machines, and attention


@dataclass(frozen=True, kw_only=True)
class Question:
    """What plans are wanted; `planner.search.search` says what each of it means."""

    model: Model
    batch: int  # sequences a step
    sequence: int  # tokens
    top: int
    objective: str
    optimizer: str
    precision: Precision
    max_axes: int
    costs: str
    by_layer: bool
    fixed: Fixed

    def check(self, machines: Sequence[Machine], attention: str | None) -> None:
        """Refuse what no plan on any of the machines can be or have."""
        for machine in machines:
            check_multiplied(machine, self.precision.compute)
        self.precision.check()
        for value, choices, what in (
            (self.objective, OBJECTIVES, "objective"),
            (self.optimizer, OPTIMIZERS, "optimizer"),
            (attention or "flash", ATTENTION, "attention"),
            (self.costs, OP_COSTS, "op_costs"),
        ):
            if value not in choices:
                raise PlanError(f"{what}: '{value}' is not possible{nearest(value, choices)}")
        for what in ("batch", "sequence", "top"):
            expect(getattr(self, what), int | np.integer, f"{what}: expected a whole number")
        if self.top < 1 or not machines:
            raise PlanError("search: ask for at least one plan, on at least one slice")
        self._check_sizes()
        self._check_held()

    def _check_sizes(self) -> None:
        model = self.model
        if self.batch < 1 or self.sequence < 1:
            raise PlanError("batch and sequence must be positive")
        other = self.sequence != model.sequence and self.fixed.lengths is None
        if model.family == "vit" and other:
            raise PlanError(
                f"sequence: {model.name} makes {model.sequence} tokens of an image; change the "
                "image size in the model instead"
            )

    def _check_held(self) -> None:
        model, fixed = self.model, self.fixed
        if fixed.keys == "dsp" and "time" not in model.attends:
            raise PlanError(
                f"fix: context.keys: layers of {model.name} see all tokens, and none to switch "
                "for; use ulysses"
            )
        uneven = fixed.imbalance is not None or fixed.padding is not None
        if model.experts is None and (uneven or fixed.exchange is not None):
            raise PlanError(f"fix: experts: {model.name} has none; leave the key out")
        if uneven and model.experts and not model.experts.dropless:
            raise PlanError(
                f"fix: experts: those of {model.name} have as many places as their capacity or "
                "slots say; leave imbalance and padding out"
            )

    def work(self, attention: str) -> Workload:
        """Return what a step of the plans computes, with an attention."""
        fixed = self.fixed
        return Workload(
            model=self.model,
            batch=self.batch,
            sequence=row_tokens(fixed.lengths, self.sequence),
            lengths=fixed.lengths,
            longest=self.sequence,
            precision=self.precision,
            optimizer=self.optimizer,
            attention=attention,
            pipeline_interleave=fixed.pipeline_interleave,
            imbalance=fixed.imbalance or 1.0,
            padding=fixed.padding or ROOM,
            **{name: getattr(fixed, name) for name in FLAGS},
        )

    def look(
        self, machines: Sequence[Machine], attention: str, progress: Progress | None
    ) -> list[Look]:
        """Look at the whole space of slices that are `alike`; an interrupt ends it."""
        keep_freed_memory()
        rankings = [
            Ranking(
                work=self.work(attention),
                costs=self.costs,
                objective=self.objective,
                top=max(self.top, CANDIDATES) if self.by_layer else self.top,
                by_layer=self.by_layer,
            )
            for _ in machines
        ]
        space = [
            *parts(
                self.model,
                machines,
                self.batch,
                self.sequence,
                self.max_axes,
                self.fixed,
                attention,
            )
        ]
        total = sum(int(part.many.sum()) for part in space)
        done = 0
        complete, lines = True, None
        try:
            for part in space:
                lines = lines or BestLines(machines, part.meshes)
                Ranking.look(rankings, machines, lines, part)
                done += int(part.many.sum())
                if progress is not None:
                    progress(done, total)
        except KeyboardInterrupt:
            complete = False
        return [(ranking, complete) for ranking in rankings]
