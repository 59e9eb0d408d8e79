"""Reading scheduled TPU programs: text to module, module to Program. Needs no JAX."""

from shardsim.xla.hlo.compiled import CompiledProgram, read_hlo
from shardsim.xla.hlo.errors import HloError

__all__ = ["CompiledProgram", "HloError", "read_hlo"]
