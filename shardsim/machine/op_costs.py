"""What a compiler estimates for operations on one chip, as a few constants with a meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from shardsim.errors import FileError
from shardsim.files import check_keys

# Constants that are fractions of a peak.
SHARES = (
    "matmul_efficiency",
    "matmul_hbm_efficiency",
    "elementwise_hbm_efficiency",
    "attention_hbm_efficiency",
    "optimizer_hbm_efficiency",
    "copy_hbm_efficiency",
    "transpose_hbm_efficiency",
)


@dataclass(frozen=True, kw_only=True)
class Residual:
    """How far the constants are from one class of operations: |log(fitted / estimated)|."""

    ops: int
    median: float
    p90: float
    worst: float
    worst_op: str


@dataclass(frozen=True, kw_only=True)
class OpCosts:
    """The constants of one chip, per device; `shardsim/cost/costs.py` has the formulas."""

    matmul_efficiency: float  # of the matrix unit's peak, before results leave it
    results_per_cycle: float  # results of a matmul that leave the matrix unit
    resident_contraction: float  # longest contraction during which the results before it leave
    matmul_hbm_efficiency: float  # of HBM's peak, for operands and results of matmuls
    prologue_bytes: float  # of a matmul, first tiles in and last tiles out: not hidden
    elementwise_hbm_efficiency: float
    vector_ops_per_cycle: float  # as the program counts them; they add to the bytes' time
    attention_hbm_efficiency: float  # of unfused attention, its softmax included
    optimizer_hbm_efficiency: float
    copy_hbm_efficiency: float  # of arrays laid out anew, the same axis densest
    transpose_hbm_efficiency: float  # of arrays laid out anew, another axis densest
    fixed_cycles: float  # of every operation

    fitted_to: str = ""
    date: str = ""  # of the compilations
    versions: Mapping[str, str] = field(default_factory=dict, compare=False, hash=False)
    residuals: Mapping[str, Residual] = field(default_factory=dict, compare=False, hash=False)

    def to_data(self) -> dict[str, Any]:
        """Return the section `compiler` of a hardware file."""
        return {
            "status": "fitted",
            "fitted_to": self.fitted_to,
            "versions": dict(self.versions),
            "date": self.date,
            "constants": {name: getattr(self, name) for name in CONSTANTS},
            "residuals": {
                name: {item.name: getattr(residual, item.name) for item in fields(Residual)}
                for name, residual in self.residuals.items()
            },
        }


CONSTANTS = tuple(
    item.name
    for item in fields(OpCosts)
    if item.default is MISSING and item.default_factory is MISSING
)


def op_costs_from_data(data: Any, where: str) -> OpCosts:
    """Read the section `compiler` of a hardware file; `where` begins every message."""
    keys = ("status", "fitted_to", "versions", "date", "constants", "residuals")
    check_keys(data, where=where, allowed=keys, required=keys)
    if data["status"] != "fitted":
        raise FileError(f"{where}: status must be fitted")
    inside = f"{where}: constants"
    check_keys(data["constants"], where=inside, allowed=CONSTANTS, required=CONSTANTS)
    values: dict[str, Any] = {}
    for name in CONSTANTS:
        value = _number(data["constants"][name], f"{where}: {name}")
        if value == 0 and name != "fixed_cycles":
            raise FileError(f"{where}: {name} must be positive")
        if name in SHARES and value > 1:
            raise FileError(f"{where}: {name} must be at most 1, not {value:g}")
        values[name] = value
    for name in ("versions", "residuals"):
        if not isinstance(data[name], Mapping):
            raise FileError(f"{where}: {name} must be a mapping")
    versions = {
        str(name)[:40]: _word(value, f"{where}: versions")
        for name, value in data["versions"].items()
    }
    residuals = {
        str(name)[:40]: _residual(value, f"{where}: residuals")
        for name, value in data["residuals"].items()
    }
    return OpCosts(
        **values,
        fitted_to=_word(data["fitted_to"], f"{where}: fitted_to"),
        date=_word(data["date"], f"{where}: date"),
        versions=versions,
        residuals=residuals,
    )


def _residual(data: Any, where: str) -> Residual:
    names = tuple(item.name for item in fields(Residual))
    check_keys(data, where=where, allowed=names, required=names)
    numbers = {name: _number(data[name], f"{where}: {name}") for name in names[:-1]}
    ops = int(numbers.pop("ops"))
    return Residual(ops=ops, worst_op=_word(data["worst_op"], where), **numbers)


def _number(value: Any, where: str) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not 0 <= value < 1e18:
        raise FileError(f"{where} must be a number, zero or more, not {value!r:.40}")
    return float(value)


def _word(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or not value:
        raise FileError(f"{where} must be a text, not {value!r:.40}")
    return value
