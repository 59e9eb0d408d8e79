"""The real TPU compiler, on a machine without a TPU."""

from shardsim.xla.tpu.cache import Cache
from shardsim.xla.tpu.service import Compilation, TpuCompiler
from shardsim.xla.tpu.topology import topology_options

__all__ = ["Cache", "Compilation", "TpuCompiler", "topology_options"]
