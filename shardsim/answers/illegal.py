"""Why no plan has the choices that a search was told to hold, and the nearest that one has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

from shardsim.machine import Machine
from shardsim.model import Model
from shardsim.plan.layout import REPLICATED, ROLES, AxisLayout, Layout
from shardsim.plan.legality import conditions
from shardsim.plan.plan import CONTEXT_KEYS, MATMUL_OVERLAP
from shardsim.plan.resolve import ROLE_OF
from shardsim.planner.fixed import fixed_of
from shardsim.planner.meshes import meshes
from shardsim.planner.space import any_legal

MOST_AXES = 6
TRIED = 12  # of sizes on each side of one that cannot be
WORDS: Mapping[str, tuple[str, ...]] = {
    "context.keys": CONTEXT_KEYS,
    "overlap.matmul": MATMUL_OVERLAP,
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a search holds, and the space that it would search else."""

    model: Model
    machine: Machine
    batch: int
    sequence: int
    attention: str
    max_axes: int = 3

    def legal(self, choices: Mapping[str, Any], max_axes: int | None = None) -> bool:
        """Return whether some plan has these choices, fitting or not."""
        fixed = fixed_of(choices)
        return any_legal(
            self.model,
            self.machine,
            self.batch,
            self.sequence,
            max_axes or self.max_axes,
            fixed,
            fixed.attention or self.attention,
        )

    def sizes(self, role: str) -> list[int]:
        """Return the sizes that a role has on some mesh of the slice."""
        every = meshes(self.machine, MOST_AXES, self.model.experts is not None).sizes
        return sorted({int(size) for size in every[:, ROLES.index(role)]})


def why_illegal(asked: Question, fix: Mapping[str, Any]) -> str:
    """Return in one line why no legal plan has the choices `fix`: which of them cannot be, by what
    rule, and the nearest values that some plan has."""
    blamed = _blamed(asked, fix)
    said = ", ".join(f"{key}={value}" for key, value in blamed.items())
    if asked.legal(blamed, MOST_AXES):
        few = f"with {asked.max_axes} axes or fewer (--max-axes)"
        return f"{said}: no mesh of {asked.machine.name} {few} has that; with more there are some"
    *_, (key, value) = blamed.items()
    others = {name: one for name, one in blamed.items() if name != key}
    if others:
        why = f"{said} cannot be together{_product(asked, blamed)}"
    else:
        why = f"{said}: {_alone(asked, key, value)}"
    near = _near(asked, others, key, value)
    told = " or ".join(str(one) for one in near)
    return f"{why}; the nearest that can be: {key}={told}" if near else why


def _blamed(asked: Question, fix: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fewest choices that no plan has: one alone if there is such a one."""
    for key, value in fix.items():
        if not asked.legal({key: value}):
            return {key: value}
    left = dict(fix)
    for key in fix:
        fewer = {name: value for name, value in left.items() if name != key}
        if fewer and not asked.legal(fewer):
            left = fewer
    return left


def _alone(asked: Question, key: str, value: Any) -> str:
    """Return why one choice cannot be."""
    root, _, word = key.partition(".")
    if root == "mesh":
        role = ROLE_OF[word]
        if role == "expert" and asked.model.experts is None:
            return f"{asked.model.name} has no experts"
        if value not in asked.sizes(role):
            return f"no part of the {asked.machine.name} torus is an axis of {value:,} devices"
        return _division(asked, role, value) or f"no mesh with it divides {asked.model.name}"
    if key == "microbatches":
        if asked.batch % value:
            return f"{asked.batch:,} sequences do not divide by {value:,}"
        each = asked.batch // value
        return f"no mesh of {asked.machine.devices:,} devices divides {each:,} sequences at a time"
    return f"no plan of {asked.model.name} on {asked.machine.name} has that"


def _division(asked: Question, role: str, size: int) -> str | None:
    """Return the first division of a mesh of one axis that is not exact."""
    axes: dict[str, Any] = {
        name: AxisLayout(factors=(size if name == role else 1,), strides=(1,)) for name in ROLES
    }
    stages = size if role == "pipeline" else 1
    layout = Layout(**axes, residual=REPLICATED, microbatches=stages)
    for _, what, length, by in conditions(asked.model, asked.batch, asked.sequence, layout):
        if int(length) % int(by):
            return f"{what}: {int(length):,} does not divide by {int(by):,}"
    return None


def _product(asked: Question, blamed: Mapping[str, Any]) -> str:
    """Return that sizes of axes multiply to more devices than there are."""
    devices = asked.machine.devices
    together = prod(value for key, value in blamed.items() if key.startswith("mesh."))
    if together > devices:
        return f": axes of {together:,} devices on {devices:,}"
    return ""


def _near(asked: Question, others: Mapping[str, Any], key: str, value: Any) -> list[Any]:
    """Return the nearest values below and above that some plan has beside the `others`."""
    choices: Iterable[Any]
    if key in WORDS:
        return [one for one in WORDS[key] if one != value and asked.legal({**others, key: one})]
    if key == "microbatches":
        small = [one for one in range(1, isqrt(asked.batch) + 1) if asked.batch % one == 0]
        choices = sorted({*small, *(asked.batch // one for one in small)})
    elif key.startswith("mesh."):
        choices = asked.sizes(ROLE_OF[key.partition(".")[2]])
    else:
        return []
    below = sorted((one for one in choices if one < value), reverse=True)
    found: list[Any] = []
    for side in (below, [one for one in choices if one > value]):
        for one in side[:TRIED]:
            if asked.legal({**others, key: one}):
                found.append(one)
                break
    return sorted(found)
