"""What the compiler's flags of a MaxText config say of a plan: its overlap, and its options."""

from __future__ import annotations

from collections.abc import Mapping

from shardsim.emit.tpu_options import vmem_options
from shardsim.machine import Machine
from shardsim.machine.chip import SCOPED_VMEM_KIB
from shardsim.plan.compiler_options import parse_compiler_options
from shardsim.plan.plan import Overlap

# Flags that change what a program holds, and those that are a plan's overlap.
_GATHERS = "xla_enable_async_all_gather"
_CARRIED = (_GATHERS, SCOPED_VMEM_KIB)
_PERMUTES = "xla_enable_async_collective_permute"
_RINGS_FROM_MIB = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
_BOTH_WAYS = "xla_tpu_spmd_bidirectional_windowed_einsum"
READ = (*_CARRIED, _PERMUTES, _RINGS_FROM_MIB, _BOTH_WAYS)
_NEVER_MIB = 100_000  # no product is as large: a ring is never made


def overlap_of(flags: Mapping[str, str], machine: Machine) -> Overlap:
    """Return what the compiler's flags say of overlap, which older chips do only if asked to."""
    usual = "false" if machine.chip.name in ("v2", "v3", "v4") else "true"
    threshold = flags.get(_RINGS_FROM_MIB, "0")
    never = threshold.isdecimal() and int(threshold) >= _NEVER_MIB
    if flags.get(_PERMUTES, usual) != "true" or never:
        matmul = "off"
    else:
        both = flags.get(_BOTH_WAYS, "true") == "true"
        matmul = "bidirectional" if both else "unidirectional"
    return Overlap(matmul=matmul, weights=flags.get(_GATHERS, usual) == "true", gradients=False)


def options_of_compiler(flags: Mapping[str, str], machine: Machine) -> dict[str, str]:
    """Return the flags that a plan keeps as the compiler's options: not what is so without them."""
    usual = vmem_options(machine.chip) | {_GATHERS: "false"}
    return parse_compiler_options(
        {key: flags[key] for key in _CARRIED if flags.get(key, usual.get(key)) != usual.get(key)}
    )
