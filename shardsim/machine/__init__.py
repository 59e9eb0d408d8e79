"""Chips with their sources, and slices of them: read from `hardware/`, named as vendors do."""

from shardsim.machine.catalog import (
    chip_from_text,
    chip_names,
    load_chip,
    load_chip_file,
    override_chip,
)
from shardsim.machine.chip import Chip, Constant
from shardsim.machine.names import default_slice, explain, parse_machine, possible_slices, scaled
from shardsim.machine.slices import Machine, TorusAxis

__all__ = [
    "Chip",
    "Constant",
    "Machine",
    "TorusAxis",
    "chip_from_text",
    "chip_names",
    "default_slice",
    "explain",
    "load_chip",
    "load_chip_file",
    "override_chip",
    "parse_machine",
    "possible_slices",
    "scaled",
]
