"""Running and reading compiled programs; JAX is imported only in other processes."""

from shardsim.emit.shrink import shrink
from shardsim.xla.host import HostDevices, verify_host

__all__ = ["HostDevices", "shrink", "verify_host"]
