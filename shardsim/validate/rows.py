"""Published runs: a row of a runs file as the plans that it states, and what it measured.

A row has the keys of a plan file, and what was measured. Two things make it short: mesh axes with
the usual names need no rules, and what a source leaves open is a list of values (of `machine`,
`batch` and sizes of the mesh): one plan is made of each combination. `rest` is the size that fills
the slice. A row without `remat` takes the least recomputation that fits in HBM.

    - id: vit22b-1024v4
      model: vit-22b
      machine: v4:8x8x16
      batch: 65536
      mesh: {fsdp: rest, model: [1, 2, 4, 8, 16]}
      remat: full
      measured: {tokens_per_s_per_chip: 1150}
      source: arXiv 2302.05442
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite, prod
from typing import Any

from shardsim.cost.predict import hbm_of
from shardsim.errors import FileError, ShardsimError, nearest
from shardsim.files import check_keys
from shardsim.machine import Machine, parse_machine
from shardsim.machine.chip import SCOPED_VMEM_KIB
from shardsim.model import Accounting, Model, accounting_named, model_flops_per_token
from shardsim.plan import Plan, plan_from_data
from shardsim.plan.io import KEYS as PLAN_KEYS
from shardsim.plan.resolve import AXIS_NAMES, rules_data
from shardsim.validate.libraries import TRAINER, implementation_of, library_of

# What a row may have measured, in the order in which the rate of tokens is taken from it.
MEASURED = (
    "tokens_per_s_per_chip",
    "tokens_per_s",
    "step_time_s",
    "tflops_per_s_per_chip",
    "mfu",
    "speedup_over_one_slice",
)
COUNTED = ("tflops_per_s_per_chip", "mfu")  # these say nothing without `accounting`
KEYS = (
    "id",
    *(key for key in PLAN_KEYS if key not in ("name", "note", "op_costs")),
    "measured",
    "accounting",
    "source",
    "confidence",
    "filled",
)
REST = "rest"
MOST_PLANS = 100
# Chips whose published runs leave an operation's on-chip memory to the compiler, and the KiB that
# it gives (docs/compiled.md).
COMPILERS_LIMIT = {"v5e": "16384", "v5p": "16384"}
UNSTATED_REMAT = ("none", "dots", "full")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row of a runs file."""

    id: str
    plans: tuple[Plan, ...]  # several where the source leaves sizes open
    measured: Mapping[str, float]  # by the keys of `MEASURED`
    accounting: Accounting | None  # how the source counted FLOPs
    source: str
    filled: Mapping[str, str]  # by the row's key: what the source leaves open, and how it is filled
    notes: tuple[str, ...] = ()
    implementation: str = TRAINER  # what its library does beyond the plan

    @property
    def family(self) -> str:
        """The chip's name."""
        return self.plans[0].machine.chip.name

    @property
    def model(self) -> Model:
        """The model, the same in all plans."""
        return self.plans[0].model

    @property
    def sequence(self) -> int:
        """Tokens per sequence."""
        return self.plans[0].sequence

    @property
    def compute(self) -> str:
        """Number format of matmuls, of whose peak an MFU is a share."""
        return self.plans[0].precision.compute

    def rate(self) -> float | None:
        """Return the measured tokens/s/chip; None if no figure of the row says it."""
        return next(iter(self.rates().values()), None)

    def rates(self) -> dict[str, float]:
        """Return the measured tokens/s/chip by each figure that says it, the surest first."""
        found = [key for key in MEASURED[:-1] if key in self.measured]
        return {key: self._rate(key) for key in found}

    def _rate(self, found: str) -> float:
        plan = self.plans[0]
        chips = plan.machine.chips
        value = self.measured[found]
        if found == "tokens_per_s_per_chip":
            return value
        if found == "tokens_per_s":
            return value / chips
        if found == "step_time_s":
            return plan.tokens / value / chips
        assert self.accounting is not None
        flops = model_flops_per_token(self.model, self.sequence, self.accounting)
        peak = plan.machine.chip.peak(self.compute)
        return (value * 1e12 if found == "tflops_per_s_per_chip" else value * peak) / flops


def read_run(row: Any, where: str) -> Run:
    """Read one row; raise `FileError` naming `where` and the key that is wrong."""
    if not isinstance(row, Mapping):
        raise FileError(f"{where}: expected a mapping of keys")
    where = f"{where} ({str(row.get('id') or 'no id')[:60]!r})"
    try:
        return _read(row, where)
    except ShardsimError as error:
        raise FileError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None


def _read(row: Mapping[str, Any], where: str) -> Run:
    required = ("id", "model", "machine", "batch", "mesh", "measured", "source")
    for key in row:
        if key not in KEYS:
            raise FileError(f"unknown key '{key}'{nearest(key, KEYS)}")
    for key in required:
        if row.get(key) is None:
            raise FileError(f"missing key '{key}'")
    measured = check_keys(row["measured"], where="measured", allowed=MEASURED)
    for key, value in measured.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FileError(f"measured.{key}: expected a number, found {str(value)[:60]!r}")
        if not (value > 0 and isfinite(value)) or (key == "mfu" and value >= 1):
            limit = "between 0 and 1 (54.9 % is 0.549)" if key == "mfu" else "positive"
            raise FileError(f"measured.{key}: must be {limit}, not {value:g}")
    accounting = None
    if row.get("accounting") is not None:
        accounting = accounting_named(row["accounting"])
    elif counted := [key for key in COUNTED if key in measured]:
        raise FileError(
            f"missing key 'accounting': measured.{counted[0]} says nothing without the source's "
            f"own count of FLOPs; choose from: {', '.join(each.value for each in Accounting)}"
        )
    for key in ("id", "source", "confidence"):
        _text(row.get(key, ""), key)
    plans: list[Plan] = []
    for data in _choices(row):
        if len(plans) == MOST_PLANS:
            raise FileError(f"its lists give more than {MOST_PLANS} plans")
        plans.append(_plan(data, where))
    if len({plan.machine.chip.name for plan in plans}) > 1:
        raise FileError("machine: its slices are of different chips")
    allowed = [*KEYS, *(f"mesh.{name}" for name in row["mesh"])]
    filled = check_keys(row.get("filled") or {}, where="filled", allowed=allowed)
    for key, text in filled.items():
        _text(text, f"filled.{key}")
    run = Run(
        id=row["id"],
        plans=tuple(plans),
        measured=dict(measured),
        accounting=accounting,
        source=row["source"],
        filled=dict(filled),
        implementation=implementation_of(
            library_of(row["source"]), plans[0].machine.chip, plans[0].model.name
        ),
    )
    _below_peak(run)
    return run


def _below_peak(run: Run) -> None:
    """Raise `FileError` where what was measured is more than the chips can multiply."""
    if (rate := run.rate()) is None:
        return
    flops = model_flops_per_token(run.model, run.sequence, Accounting.MAXTEXT_2025)
    share = max(rate * flops / plan.machine.chip.peak(run.compute) for plan in run.plans)
    if share >= 1:
        found = next(key for key in MEASURED if key in run.measured)
        raise FileError(
            f"measured.{found}: {run.measured[found]:g} would be {share:.0%} of the {run.compute} "
            f"peak of the {run.family}; check its unit, chips, batch and precision"
        )


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise FileError(f"{where}: expected text, found {str(value)[:60]!r}")


def _choices(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what a plan file holds, for every combination of what the row leaves open."""
    given = {key: row[key] for key in PLAN_KEYS if row.get(key) is not None} | {"name": row["id"]}
    mesh = row["mesh"]
    named = mesh if isinstance(mesh, Mapping) else {}
    sizes = [_open(size, f"mesh.{name}") for name, size in named.items()]
    always = [_open(row[key], key) for key in ("machine", "batch")]
    for machine, batch, *chosen in product(*always, *sizes):
        data = given | {"machine": machine, "batch": batch}
        if sizes:
            data["mesh"] = _mesh(dict(zip(mesh, chosen, strict=True)), parse_machine(str(machine)))
            if row.get("rules") is None:
                data |= _usual(data["mesh"])
        yield data


def _open(value: Any, key: str) -> list[Any]:
    if value == []:
        raise FileError(f"{key}: an empty list; give the values that the source leaves open")
    return value if isinstance(value, list) else [value]


def _mesh(sizes: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """Return the mesh with the size that is `rest` filled in."""
    filling = [name for name, size in sizes.items() if size == REST]
    if len(filling) > 1:
        raise FileError(f"mesh: only one axis can be the rest, not {' and '.join(filling)}")
    whole = [each.get("size") if isinstance(each, Mapping) else each for each in sizes.values()]
    numbers = [each for each in whole if isinstance(each, int)]
    if filling and len(numbers) == len(sizes) - 1:
        others = prod(numbers)
        if others < 1 or machine.devices % others:
            raise FileError(
                f"mesh: sizes multiply to {others}, which does not divide the {machine.devices} "
                f"devices of {machine.name}"
            )
        sizes[filling[0]] = machine.devices // others
    return sizes


def _usual(mesh: Mapping[str, Any]) -> dict[str, Any]:
    """Return mesh and rules of axes with the usual names, without those of size 1."""
    names = list(AXIS_NAMES.values())
    for name in mesh:
        if name not in names:
            raise FileError(
                f"mesh: what axis '{name}' splits must be said in 'rules'{nearest(name, names)} "
                "(context gathers keys and values)"
            )
    kept = {name: size for name, size in mesh.items() if size != 1} or {"data": 1}
    return {"mesh": kept, "rules": rules_data(kept)}


def _plan(data: dict[str, Any], where: str) -> Plan:
    """Return the plan; where remat is not stated the least recomputation that fits."""
    if "remat" in data:
        return plan_from_data(data, where, uneven=True)
    for remat in UNSTATED_REMAT:
        plan = plan_from_data(data | {"remat": remat}, where, uneven=True)
        use = hbm_of(plan, TRAINER)
        if use.fits and not use.recomputed:  # nobody asks for what a compiler has to drop
            break
    return plan


def as_launched(plan: Plan) -> Plan:
    """Return the plan of a published run with the on-chip memory that its operations had.

    Launch scripts for v6e and tpu7x give operations what emitted steps do, those for v5e and v5p
    leave it to the compiler (`flags` in shardsim/xla/trainers/programs.yaml).
    """
    limit = COMPILERS_LIMIT.get(plan.machine.chip.name)
    if limit is None:
        return plan
    return replace(plan, compiler_options={SCOPED_VMEM_KIB: limit, **plan.compiler_options})
