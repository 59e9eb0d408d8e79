"""The answers that the page gets, as plain data: the calls and the tables of the command line."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import shardsim
from shardsim.answers.explain import explain
from shardsim.answers.illegal import Question
from shardsim.answers.trials import set_text
from shardsim.answers.why_not import none_found
from shardsim.cost.predict import Prediction, predict
from shardsim.cost.words import HBM, PARTS
from shardsim.errors import PlanError, nearest
from shardsim.machine import Machine
from shardsim.model import model_names
from shardsim.plan import Plan, load_plan, plan_names
from shardsim.plan.io import dump_plan
from shardsim.plan.optimizer import OPTIMIZERS
from shardsim.plan.plan import ATTENTION, CONTEXT_KEYS, CONTEXT_ORDERS, MATMUL_OVERLAP, OP_COSTS
from shardsim.plan.remat import POLICIES
from shardsim.planner.attention import default_attention
from shardsim.planner.changes import changed, positive
from shardsim.planner.compare import how_priced, priced_alike
from shardsim.planner.found import SearchResult
from shardsim.planner.presets import plan_of_mesh
from shardsim.planner.search import search
from shardsim.program.passes import IMPLEMENTATIONS, USUAL
from shardsim.serve import shown
from shardsim.serve.asked import Asked, read, word
from shardsim.views.explain import TRIALS, fitting, some
from shardsim.views.plans import DETAILS, found
from shardsim.views.table import table
from shardsim.views.write import cells

FOUND_KEPT = 50  # plans of searches, for whoever goes back to one
FOUND_SHOWN = 5
FIRST = ("number", "mfu", "step_time_s", "hbm_peak_gib")  # columns of plans that were found
LEFT_OUT = (*FIRST, *DETAILS, "limited_by")  # a plan that is taken says so
REMEMBERED = 64  # predictions
PLAN_FORM = "plan"
SEARCHED = ("model", "machine", "chip", "sequence", "optimizer", "precision", "op_costs")
ENDINGS = {"json": "json", "yaml": "yaml", "maxtext": "yml", "levanter": "yaml"}  # else Python


class Desk:
    """Plans by name: those given, those that ship with shardsim, and those that searches found.

    Each call but `start` takes a request as `asked.read` does and returns plain data, or raises
    `ShardsimError`. Several threads may call at once.
    """

    def __init__(self, given: Mapping[str, Plan]) -> None:
        """Take plans under the names by which commands call them."""
        self._given = dict(given)
        self._shipped = plan_names()
        self._models = tuple(model_names())
        self._found: OrderedDict[str, Plan] = OrderedDict()
        self._counted = 0
        self._long_work = threading.Lock()
        self._shipped_plan = lru_cache(maxsize=None)(load_plan)
        self._prediction = lru_cache(maxsize=REMEMBERED)(self._predicted)

    def start(self) -> dict[str, Any]:
        """Return what the page must know before it asks."""
        from shardsim.emit import FORMS

        return {
            "version": shardsim.__version__,
            "plans": [*self._given, *(name for name in self._shipped if name not in self._given)],
            "choices": {
                "model": self._models,
                "remat": list(POLICIES),
                "attention": ATTENTION,
                "optimizer": list(OPTIMIZERS),
                "overlap.matmul": MATMUL_OVERLAP,
                "context.keys": CONTEXT_KEYS,
                "context.order": CONTEXT_ORDERS,
                "costs": OP_COSTS,
                "as": list(IMPLEMENTATIONS),
                "form": [PLAN_FORM, *FORMS],
            },
            "parts": list(PARTS),
            "hbm": list(HBM),
        }

    def predict(self, data: Any) -> dict[str, Any]:
        """Return a prediction with its tables, beside the `pinned` one where there is one."""
        started = time.perf_counter()
        asked = [self._asked(data)]
        if data.get("pinned") is not None:
            asked.insert(0, self._asked(data["pinned"]))
        plans = [one.plan(self._base(one.name)) for one in asked]
        said, implementation = _pricing(data)
        costs = priced_alike(plans, said)[1]
        items = [self._prediction(_Key(one, plan), costs, implementation)
                 for one, plan in zip(asked, plans, strict=True)]  # fmt: skip
        item, base = items[-1], self._base(asked[-1].name)
        machine = asked[-1].machine(base)
        path = asked[-1].name if asked[-1].name not in self._found else "plan.yaml"
        return {
            "base": shown.controls(base),
            "controls": shown.controls(item.plan),
            "figures": shown.figures(machine.chip, machine.slices),
            "prediction": item.to_data(),
            "pinned": items[0].to_data() if len(items) > 1 else None,
            "headline": shown.headline(items),
            "says": shown.said(item),
            "priced": f"priced {how_priced(plans, costs)}, done as {item.implementation}",
            "tables": shown.tables(items),
            "command": asked[-1].command(path, costs, implementation),
            "seconds": time.perf_counter() - started,
        }

    def explain(self, data: Any) -> dict[str, Any]:
        """Return the single changes that would help most, each as texts for --set."""
        asked = self._asked(data)
        costs, implementation = _pricing(data)
        plan = asked.plan(self._base(asked.name))
        with self._alone():
            made = explain(plan, costs=costs, implementation=implementation)
        best = some(made.trials)
        return {
            "says": fitting(made),
            "table": cells(table(TRIALS, best)),
            "sets": [[set_text({key: one.changes[key]}) for key in one.changes] for one in best],
        }

    def search(self, data: Any) -> dict[str, Any]:
        """Return the best plans for a plan's model, slice and batch; they stay on the desk."""
        asked = self._asked(data)
        base = self._base(asked.name)
        plan = _spread(asked, base)
        many = positive(asked.changes.get("batch", base.batch), "batch")
        said, implementation = _pricing(data)
        costs = said or plan.op_costs

        def again(machine: Machine, batch: int = many, **other: Any) -> SearchResult:
            given: dict[str, Any] = {"optimizer": plan.optimizer, "precision": plan.precision}
            given |= {"sequence": plan.sequence, "costs": costs, "top": FOUND_SHOWN, **other}
            return search(plan.model, machine, batch, **given)

        with self._alone():
            result = again(plan.machine)
            if not result.predictions:
                raise PlanError(none_found(result.slices[0], _question(plan, many), {}, again))
        made = found(result.predictions)
        usual = USUAL[costs]
        ranked = f"; ranked as {usual}" if implementation not in (None, usual) else ""
        counted = f"{result.searched:,} plans considered, {result.fit:,} fit"
        return {
            "says": f"{counted}, in {result.seconds:.1f} s{ranked}",
            "table": cells(made.only(*FIRST, *(key for key in made.keys if key not in LEFT_OUT))),
            "plans": [self._keep(item.plan, asked.machine(base)) for item in result.predictions],
        }

    def export(self, data: Any) -> dict[str, Any]:
        """Return a plan as the text of a file, and a name for it."""
        from shardsim.emit import export_plan

        asked = self._asked(data)
        plan = asked.plan(self._base(asked.name))
        form = word(data, "form") or PLAN_FORM
        text = dump_plan(plan) if form == PLAN_FORM else export_plan(plan, form)
        stem = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in plan.name)
        name = f"{stem}.yaml" if form == PLAN_FORM else f"{stem}-{form}.{ENDINGS.get(form, 'py')}"
        lost = ", ".join(key for key in asked.changes if key.startswith("chip."))
        return {
            "name": name,
            "text": text,
            "says": f"{lost}: not in the file, which names a chip as it is" if lost else "",
        }

    def _asked(self, data: Any) -> Asked:
        return read(data, self._base, self._models)

    def _base(self, name: str) -> Plan:
        """Return the plan of a name; no other file is ever read."""
        for known in (self._given, self._found):
            if name in known:
                return known[name]
        if name in self._shipped:
            return self._shipped_plan(name)
        raise PlanError(
            f"plan: {name[:60]!r} is not on the desk{nearest(name, [*self._given, *self._shipped])}"
        )

    def _keep(self, plan: Plan, machine: Machine) -> str:
        """Put a plan on the desk, on a slice whose chip no slider has changed."""
        self._counted += 1
        name = f"best {self._counted}"
        self._found[name] = replace(plan, machine=machine)
        while len(self._found) > FOUND_KEPT:
            self._found.popitem(last=False)
        return name

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Do one long piece of work at a time."""
        if not self._long_work.acquire(blocking=False):
            raise PlanError("a search is running already; wait for its answer")
        try:
            yield
        finally:
            self._long_work.release()

    def _predicted(self, key: _Key, costs: str, implementation: str | None) -> Prediction:
        return predict(key.plan, costs=costs, implementation=implementation)


def _spread(asked: Asked, base: Plan) -> Plan:
    """Return a plan with what a search keeps of what is asked, over a data axis alone.

    So a search answers where the mesh that is asked for does not suit its slice.
    """
    devices = base.machine.devices
    plan = plan_of_mesh(base.model, base.machine, devices, {"data": devices}, base.sequence)
    plan = replace(plan, optimizer=base.optimizer, precision=base.precision, op_costs=base.op_costs)
    kept = {key: value for key, value in asked.changes.items() if key.partition(".")[0] in SEARCHED}
    return changed(plan, kept | {"batch": asked.machine(base).devices})


def _question(plan: Plan, batch: int) -> Question:
    """Return what a search for a plan's model and slice asks."""
    return Question(
        model=plan.model,
        machine=plan.machine,
        batch=batch,
        sequence=plan.sequence,
        attention=default_attention(plan.model, plan.sequence),
    )


class _Key:
    """A plan that compares by what was asked: plans themselves cannot be hashed."""

    def __init__(self, asked: Asked, plan: Plan) -> None:
        self.plan = plan
        self._text = json.dumps([asked.name, asked.texts])

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text


def _pricing(data: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the op costs and the implementation that a request names."""
    costs = word(data, "costs")
    if costs is not None and costs not in OP_COSTS:
        raise PlanError(f"costs: {costs[:60]!r} is not possible{nearest(costs, OP_COSTS)}")
    return costs, word(data, "as")
