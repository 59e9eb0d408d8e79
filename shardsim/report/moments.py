"""HBM by use at the moments of a step, of a prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from shardsim.cost.predict import Prediction
from shardsim.cost.words import HBM
from shardsim.units import GIB
from shardsim.views.table import Column, Table, table


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One moment of a step and what HBM of one device holds then, in bytes by use."""

    name: str
    short: str  # the same in two lines, for a picture
    uses: dict[str, float]  # keys: those of `shardsim.cost.words.HBM`

    @property
    def total_bytes(self) -> float:
        """All that is in use."""
        return sum(self.uses.values())


def hbm_moments(item: Prediction) -> tuple[Moment, ...]:
    """Return five moments of a step in order; the largest is the prediction's peak.

    Parameters and optimizer state are always there. Activations of all layers are kept until the
    backward pass starts, and nothing else as the forward pass ends; the gradients' room is taken
    then. The update needs the gradients only.
    """
    use = item.use
    layer, head = (float(at) for at in use.at)
    state = {
        "parameters_bytes": float(use.parameters_bytes),
        "optimizer_bytes": float(use.optimizer_bytes),
        "gradients_bytes": 0.0,
        "activations_bytes": 0.0,
        "workspace_bytes": 0.0,
    }
    kept = state | {"activations_bytes": float(use.activations_bytes)}
    gradients = {"gradients_bytes": float(use.gradients_bytes)}
    there = sum(kept.values())
    return (
        Moment(name="between steps", short="between\nsteps", uses=state),
        Moment(name="end of the forward pass", short="forward\nends", uses=kept),
        Moment(
            name="output head",
            short="output\nhead",
            uses=kept | {"workspace_bytes": max(head - there, 0.0)},
        ),
        Moment(
            name=use.moments[0],
            short="layers" if item.plan.forward_only else "backward\nstarts",
            uses=kept
            | gradients
            | {"workspace_bytes": max(layer - there - gradients["gradients_bytes"], 0.0)},
        ),
        Moment(name="optimizer update", short="update", uses=state | gradients),
    )


def moments(item: Prediction) -> Table:
    """Return HBM of one device by use at five moments of a step."""

    def gib(use: str) -> Callable[[Moment], float]:
        return lambda moment: moment.uses[use] / GIB

    columns = [
        Column("moment", "GiB on one device", attrgetter("name")),
        *(Column(use, name, gib(use), ".2f") for use, name in HBM.items()),
        Column("together", "together", lambda moment: moment.total_bytes / GIB, ".2f"),
    ]
    return table(columns, hbm_moments(item))
