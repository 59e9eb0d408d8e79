"""Number formats of a plan: of products, of what is stored, and of what travels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from shardsim.errors import PlanError, instead, nearest
from shardsim.machine import Machine

NARROW = ("fp8", "int8")  # formats that only some chips multiply
DTYPE_BYTES: Mapping[str, int] = {"f32": 4, "bf16": 2, "fp8": 1, "int8": 1}
SCALES = ("dynamic", "static", "unit")
# Products that may stay in bf16: by their weights, and those that make gradients of weights.
WEIGHT_GRADIENTS = "weight_gradients"
PRODUCTS = ("head", "attention", "mlp", "experts", WEIGHT_GRADIENTS)
_SPARSE = re.compile(r"([1-9]\d?):([1-9]\d?)")


def wire(compute: str) -> str:
    """Return the format in which gradients travel where nothing casts them: that of products."""
    return "f32" if compute == "f32" else "bf16"


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats: of matmul inputs, stored parameters, and gradients on the wire.

    Summed gradients are kept in the format of `gradients`, or if it is empty as parameters are;
    moments in that of `state`, or as the optimizer has them. Beside them an optimizer may keep
    weights of its own in the format of `master`, of which the parameters are a copy (arXiv
    1710.03740).

    Operands of 8 bits have `scales` from their largest element ("dynamic": one more pass), fixed
    ones ("static"), or none at run time, as the model's own factors keep them in range ("unit",
    arXiv 2303.11257). Products of `bf16` stay in it. Layers' weights travel with 8 bits where
    `weights` says so, else with 16. Of layers' weights that are sparse n:m, n of m in a row are
    not zero.
    """

    compute: str = "bf16"
    parameters: str = "f32"
    reduce: str = "bf16"
    gradients: str = ""
    state: str = ""
    master: str = ""
    weights: str = ""
    scales: str = "dynamic"
    bf16: tuple[str, ...] = ()
    sparsity: str = ""

    def check(self) -> None:
        """Raise `PlanError` for a key that is wrong by itself or beside others."""
        for key in ("compute", "parameters", "reduce"):
            choose(getattr(self, key), DTYPE_BYTES, f"precision.{key}")
        for key in ("gradients", "state", "master"):
            if value := getattr(self, key):
                choose(value, DTYPE_BYTES, f"precision.{key}")
        if self.master and DTYPE_BYTES[self.master] <= DTYPE_BYTES[self.parameters]:
            raise PlanError(
                f"precision.master: {self.master} is no wider than the parameters, "
                f"{self.parameters}; use a wider one, or leave the key out"
            )
        choose(self.scales, SCALES, "precision.scales")
        for product in self.bf16:
            choose(product, PRODUCTS, "precision.bf16")
        usual = Precision()
        if self.compute not in NARROW:
            for key in ("weights", "scales", "bf16"):
                if getattr(self, key) != getattr(usual, key):
                    raise PlanError(
                        f"precision.{key}: products of {self.compute} have no scales and are all "
                        f"alike; use it with compute: {' or '.join(NARROW)}"
                    )
        if self.weights not in ("", self.compute):
            raise PlanError(
                f"precision.weights: what is cast before it travels is what products read, "
                f"{self.compute}; use that, or leave the key out"
            )
        found = _SPARSE.fullmatch(str(self.sparsity)) if self.sparsity else None
        if self.sparsity and (found is None or int(found[1]) >= int(found[2])):
            raise PlanError(
                "precision.sparsity: expected n:m in quotes, as '2:4': two of four in a row are "
                f"not zero, not {self.sparsity!r:.40}"
            )


def choose(value: object, choices: tuple[str, ...] | Mapping[str, object], key: str) -> None:
    """Raise `PlanError` for a value that is none of the choices of a key."""
    if not isinstance(value, str) and (hint := instead(value, choices)):
        raise PlanError(f"{key}: {value!r:.60} is not possible{hint}")
    if value not in choices:
        raise PlanError(f"{key}: '{value}' is not possible{nearest(value, choices)}")


def check_multiplied(machine: Machine, compute: str, key: str = "compute") -> None:
    """Refuse a format that a chip has no unit for: it would run as another."""
    chip = machine.chip
    if compute in NARROW and compute not in chip.peak_flops:
        own = ", ".join(one for one in [*chip.peak_flops, "f32"] if one in DTYPE_BYTES)
        raise PlanError(f"precision.{key}: {chip.name} has no {compute}; choose from: {own}")
