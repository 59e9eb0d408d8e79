"""Options of the TPU compiler that an exported plan is compiled with."""

from __future__ import annotations

from shardsim.machine import Chip
from shardsim.machine.chip import SCOPED_VMEM_KIB
from shardsim.plan import Plan


def tpu_options(plan: Plan) -> dict[str, str]:
    """Return the TPU compiler's options: for the plan's overlap switches, then its own.

    Names as in MaxText's benchmarks/xla_flags_library.py, but for three that libtpu lists.
    Compiled for v4, v5e, v5p and v6e with libtpu 0.0.42: `ici_ag_pipelining` gathers the next
    layer's weights while the current one computes, forward and backward; two at a time, each
    fused into one matmul (not `multiple_steps`, which lets one gather keep out all others);
    `prefer_async_allgather` keeps gathers over three torus axes, which else become all-reduces
    that nothing hides. No option made reductions of gradients asynchronous. The last ones let the
    partitioner make collective matmuls by itself, or forbid it. Other machines have none.
    Operations get the on-chip memory that `vmem_options` says. Where two products are estimated to
    take longer as one (`products_apart` in hardware/) they stay apart.
    """
    if plan.machine.chip.kind != "tpu":
        return {}

    def flag(on: bool) -> str:
        return "true" if on else "false"

    hops = plan.context.keys == "ring" and plan.context.overlap
    weights = flag(plan.overlap.weights)
    options = {
        "xla_tpu_enable_async_collective_fusion": weights,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": weights,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "false",
        "xla_tpu_overlap_compute_collective_tc": weights,
        "xla_enable_async_all_gather": weights,
        "xla_tpu_enable_ici_ag_pipelining": weights,
        "xla_tpu_prefer_async_allgather_to_allreduce": weights,
        "xla_enable_async_collective_permute": flag(plan.overlap.matmul != "off" or hops),
    }
    if plan.overlap.weights:
        options["xla_max_concurrent_async_all_gathers"] = "2"
    if plan.execution == "partitioned":
        on = plan.overlap.matmul != "off"
        options["xla_jf_spmd_threshold_for_windowed_einsum_mib"] = "0" if on else "1000000"
        options["xla_tpu_spmd_bidirectional_windowed_einsum"] = flag(
            plan.overlap.matmul == "bidirectional"
        )
    if plan.machine.chip.products_apart:
        options["xla_tpu_dot_dot_fusion"] = "false"
    return {**options, **vmem_options(plan.machine.chip), **plan.compiler_options}


def vmem_options(chip: Chip) -> dict[str, str]:
    """Return the compiler's option for the on-chip memory that one operation may take.

    With more of it a matmul reads its operands fewer times: on v5e and v5p products are estimated
    at 0.95 to 0.97 of the peak with 32 MiB, at 0.6 to 0.9 with the compiler's own 16
    (`scoped_vmem_bytes` in hardware/).
    """
    if chip.scoped_vmem_bytes is None:
        return {}
    return {SCOPED_VMEM_KIB: str(int(chip.scoped_vmem_bytes / 1024))}
