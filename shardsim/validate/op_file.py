"""A hardware file with the constants that were learned from its compiler."""

from __future__ import annotations

from pathlib import Path

import yaml

from shardsim.files import data_folder
from shardsim.machine.catalog import OWN_LIMIT
from shardsim.machine.op_costs import OpCosts

HEAD = """
# What the TPU compiler estimates for operations: constants per device, and how far they are from
# its estimates, |log(fitted / estimated)|. See docs/cost-model.md; made by `shardsim calibrate`.
"""


def hardware_path(name: str) -> Path:
    """Return where the hardware file of the chip called `name` is."""
    return data_folder("hardware") / f"{name}.yaml"


def without_section(name: str) -> str:
    """Return the hardware file of a chip up to its section `compiler` and what follows."""
    text = hardware_path(name).read_text(encoding="utf-8")
    for mark in (HEAD, "\ncompiler:"):
        text = text.partition(mark)[0]
    return text.rstrip("\n") + "\n"


def hardware_text(name: str, costs: OpCosts, own: OpCosts | None = None) -> str:
    """Return the hardware file of a chip with its section `compiler` made anew, and that of what
    operations take within the compiler's `own` limit of on-chip memory, if there is one."""
    data = {"compiler": costs.to_data()} | ({} if own is None else {OWN_LIMIT: own.to_data()})
    section = yaml.safe_dump(data, sort_keys=False, width=96)
    return without_section(name) + HEAD + str(section)
