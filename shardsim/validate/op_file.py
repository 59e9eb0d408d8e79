"""A hardware file with the constants that were learned from its compiler."""

from __future__ import annotations

import yaml

from shardsim.files import data_folder
from shardsim.machine import Chip
from shardsim.machine.op_costs import OpCosts

HEAD = """
# What the TPU compiler estimates for operations: constants per device, and how far they are from
# its estimates, |log(fitted / estimated)|. See docs/cost-model.md; made by `shardsim calibrate`.
"""


def hardware_text(chip: Chip, costs: OpCosts) -> str:
    """Return the hardware file of `chip` with its section `compiler` made anew."""
    path = data_folder("hardware") / f"{chip.name}.yaml"
    text = path.read_text(encoding="utf-8")
    for mark in (HEAD, "\ncompiler:"):
        text = text.partition(mark)[0]
    return text.rstrip("\n") + "\n" + HEAD + section_text(costs)


def section_text(costs: OpCosts) -> str:
    """Return the section `compiler` of a hardware file."""
    text: str = yaml.safe_dump({"compiler": costs.to_data()}, sort_keys=False, width=96)
    return text
