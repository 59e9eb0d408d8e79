"""Running and reading compiled programs; JAX is imported only in other processes."""

from shardsim.xla.host import HostDevices, verify_host
from shardsim.xla.shrink import shrink

__all__ = ["HostDevices", "shrink", "verify_host"]
