"""Anyone's compiled function: every collective and copy, its cost, and what would remove it."""

from shardsim.xla.inspect.function import inspect
from shardsim.xla.inspect.inspected import Inspected, inspect_file, inspect_hlo

__all__ = ["Inspected", "inspect", "inspect_file", "inspect_hlo"]
