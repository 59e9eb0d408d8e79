"""What a GPU's kernels sustain, as a few constants with a meaning; measured on one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from shardsim.errors import FileError
from shardsim.files import check_keys


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The constants of one GPU beside its chip's figures: the chip's `matmul_efficiency` is that of
    long matmuls, `hbm_efficiency` that of streams, `op_overhead_s` the start of every kernel.

    `shardsim.cost.costs.KernelCosts` has the formulas.
    """

    contraction_start: float  # as many more of the contraction a matmul takes as long as
    scores_hbm_efficiency: float  # products of attention with scores in HBM
    sum_hbm_efficiency: float  # of HBM's peak, reading for sums, as norms do
    copy_hbm_efficiency: float  # copies of whole arrays
    transpose_hbm_efficiency: float  # another axis densest
    optimizer_hbm_efficiency: float
    attention_efficiency: float  # of the peak: products of cuDNN's attention
    attention_gradient_efficiency: float
    softmax_ops: float  # vector operations for each pair, in turn with the products
    softmax_gradient_ops: float

    status: str = "fitted"  # or "assumed": of another GPU
    fitted_to: str = ""
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict, compare=False, hash=False)

    def to_data(self) -> dict[str, Any]:
        """Return the section `kernels` of a hardware file."""
        return {
            "status": self.status,
            "fitted_to": self.fitted_to,
            "versions": dict(self.versions),
            "date": self.date,
            "constants": {name: getattr(self, name) for name in CONSTANTS},
        }


CONSTANTS = tuple(
    item.name
    for item in fields(Kernels)
    if item.default is MISSING and item.default_factory is MISSING
)
MAY_BE_ZERO = ("contraction_start",)


def kernels_from_data(data: Any, where: str) -> Kernels:
    """Read the section `kernels` of a hardware file; `where` begins every message."""
    keys = ("status", "fitted_to", "versions", "date", "constants")
    check_keys(data, where=where, allowed=keys, required=keys)
    if data["status"] not in ("fitted", "assumed"):
        raise FileError(f"{where}: status must be fitted or assumed")
    inside = f"{where}: constants"
    check_keys(data["constants"], where=inside, allowed=CONSTANTS, required=CONSTANTS)
    values: dict[str, float] = {}
    for name in CONSTANTS:
        value = data["constants"][name]
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not 0 <= value < 1e9:
            raise FileError(f"{where}: {name} must be a number, zero or more, not {value!r:.40}")
        if value == 0 and name not in MAY_BE_ZERO:
            raise FileError(f"{where}: {name} must be positive")
        if name.endswith("_efficiency") and value > 1:
            raise FileError(f"{where}: {name} must be at most 1, not {value:g}")
        values[name] = float(value)
    for name in ("fitted_to", "date"):
        if not isinstance(data[name], str) or not data[name].strip():
            raise FileError(f"{where}: {name} must be a text")
    if not isinstance(data["versions"], Mapping):
        raise FileError(f"{where}: versions must be a mapping")
    versions = {str(name)[:40]: str(value)[:80] for name, value in data["versions"].items()}
    return Kernels(
        **values,
        status=data["status"],
        fitted_to=data["fitted_to"],
        date=data["date"],
        versions=versions,
    )
