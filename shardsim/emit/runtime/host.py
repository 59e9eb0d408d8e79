"""Host devices: threads of the CPU that stand for chips."""

from __future__ import annotations

import os

# Each collective on the CPU blocks one thread per device until all its members have come, and what
# leads to them needs threads too: with as many as devices (XLA's least) a member that is waited for
# may find none, and the process is ended after 40 s. A dozen independent collectives of 8 devices
# on one core stop with 8 and with 12 threads, and not with 16 (jaxlib 0.10.2). Idle ones are cheap.
THREADS_PER_DEVICE = 8
# XLA's CPU client knows collectives apart by their kind and group, and its usual scheduler lets
# those that do not read each other run at once: several gradients of weights that are scattered in
# a row meet each other's members, and the process is ended (jaxlib 0.10.2).
ONE_BY_ONE = {"xla_cpu_enable_concurrency_optimized_scheduler": False}


def thread_variables(devices: int) -> dict[str, str]:
    """Return what the environment must hold for XLA to have enough threads for `devices`.

    Its CPU client makes both its pools (of launches and of operations) as large as PJRT_NPROC, or
    else NPROC or the number of cores, and at least as large as the number of devices (openxla/xla,
    xla/pjrt/utils.cc, DefaultThreadPoolSize; xla/pjrt/cpu/cpu_client.cc).
    """
    return {"PJRT_NPROC": str(THREADS_PER_DEVICE * devices)}


def use_host_devices(devices: int) -> None:
    """Make `devices` host devices in this process; JAX must not have started yet."""
    import jax

    os.environ.update(thread_variables(devices))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
