"""A hardware file with the constants that were learned from its compiler."""

from __future__ import annotations

from pathlib import Path

import yaml

from shardsim.files import data_folder
from shardsim.machine.op_costs import OpCosts

HEAD = """
# What the TPU compiler estimates for operations: constants per device, and how far they are from
# its estimates, |log(fitted / estimated)|. See docs/cost-model.md; made by `shardsim calibrate`.
"""


def hardware_path(name: str) -> Path:
    """Return where the hardware file of the chip called `name` is."""
    return data_folder("hardware") / f"{name}.yaml"


def without_section(name: str) -> str:
    """Return the hardware file of a chip up to its section `compiler`, which is the last."""
    text = hardware_path(name).read_text(encoding="utf-8")
    for mark in (HEAD, "\ncompiler:"):
        text = text.partition(mark)[0]
    return text.rstrip("\n") + "\n"


def hardware_text(name: str, costs: OpCosts) -> str:
    """Return the hardware file of a chip with its section `compiler` made anew."""
    section = yaml.safe_dump({"compiler": costs.to_data()}, sort_keys=False, width=96)
    return without_section(name) + HEAD + str(section)
