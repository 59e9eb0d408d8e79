"""Options of the TPU compiler as a trainer passes them on: all of its code is partitioned."""

from __future__ import annotations

from dataclasses import replace

from shardsim.emit.tpu_options import tpu_options
from shardsim.plan import Plan

# Trainers bring compilers newer than the plan's; libtpu 0.0.51 refuses fused asynchronous
# collectives elsewhere: "not supported/recommended on platforms other than TPU v5e".
# AXLearn (common/compiler_options.py) sets them on v6e too.
_FUSES_COLLECTIVES = ("v5e", "v6e")
_FUSION = ("xla_tpu_enable_async_collective_fusion", "xla_tpu_overlap_compute_collective_tc")


def compiler_options(plan: Plan) -> dict[str, str]:
    """Return the compiler's options for the plan's overlap switches."""
    options = tpu_options(replace(plan, execution="partitioned"))
    fuses = plan.machine.chip.name in _FUSES_COLLECTIVES
    return {name: value for name, value in options.items() if fuses or not name.startswith(_FUSION)}
