"""Verification against host devices: a plan's tiny copy is run beside the unsharded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shardsim.emit.runtime.host import thread_variables
from shardsim.emit.shrink import shrink
from shardsim.emit.specs import plan_data
from shardsim.errors import PlanError
from shardsim.plan import Plan, PlanOrPath, as_plan
from shardsim.xla.child import Child
from shardsim.xla.compare import UNPLANNED, Comparison, answer
from shardsim.xla.hlo import read_hlo

STEPS = 2
LARGEST_ERROR = 1e-5  # relative, of loss, gradients and updated parameters in float32

# Compile fast rather than well: the steps run twice on tiny arrays. Without fusions written as
# MLIR, XLA compiles these steps in half the time.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)
# Small loops would then go into calls; combined all-reduces would mix what was planned with what
# was not.
_FLAGS = (
    f"{QUICK} --xla_disable_hlo_passes=all-reduce-combiner,"
    "cpu-all-reduce-combiner,small-while-loop-hoisting"
)

# glibc gives arrays of more than 32 MiB back to the system when a step ends, and every page of the
# next step's is a fault: a fifth of a step of 40 MiB a device. A training library keeps its memory.
KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**29),
}

Progress = Callable[[str], None]


def host_environment(devices: int, flags: str = "") -> dict[str, str]:
    """Return the variables with which a process has `devices` host devices, and XLA's `flags`."""
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}".strip(),
        **thread_variables(devices),
        **KEPT_MEMORY,
    }


class HostDevices(Child):
    """A process with `devices` host devices that runs plans one after another.

    Its environment is its own, so the caller's JAX (if any) keeps the devices it has.
    """

    def __init__(
        self, devices: int = 8, *, module: str = "shardsim.xla.worker", flags: str = _FLAGS
    ) -> None:
        self.devices = devices
        super().__init__(
            module,
            host_environment(devices, flags),
            called="the process with host devices",
            failing="the plan did not run on host devices",
            options=("-W", "error"),
        )

    def compare(self, plan: Plan, steps: int = STEPS) -> HostRun:
        """Run `plan` as it is, and the same model unsharded."""
        return HostRun(plan, self.ask({"data": plan_data(plan), "steps": steps}))


class HostRun:
    """What came out of running one plan beside the unsharded model."""

    def __init__(self, plan: Plan, told: dict[str, Any]) -> None:
        self.plan = plan
        self.loss_error: float = told["loss_rel_error"]
        self.gradient_error: float = told["grad_rel_error"]
        self.update_error: float = told["update_rel_error"]
        mesh = {axis.name: axis.size for axis in plan.mesh}
        self.collectives = Comparison(plan, read_hlo(told["program"], mesh))

    @property
    def same_numbers(self) -> bool:
        """Whether loss, gradients and updates are those of the unsharded model."""
        errors = (self.loss_error, self.gradient_error, self.update_error)
        return all(error <= LARGEST_ERROR for error in errors)

    @property
    def ok(self) -> bool:
        """Whether the numbers are right and, in the explicit way, the collectives as planned."""
        agreed = self.plan.execution == "partitioned" or not self.collectives.differences
        return self.same_numbers and agreed

    def unplanned(self) -> list[dict[str, Any]]:
        """Return what was compiled beyond the plan, with what it is for."""
        rows = []
        for one in self.collectives.accounts:
            if one.same or one.beyond_bytes <= 0:
                continue
            source = UNPLANNED.get(one.purpose, "")
            if self.collectives.covered(one):
                source = (
                    f"{one.purpose}: {one.compiled_bytes:.0f} bytes where "
                    f"{one.planned_bytes:.0f} are planned"
                )
            rows.append(
                {
                    "kind": one.kind,
                    "mesh_axes": list(one.mesh_axes),
                    "bytes": one.beyond_bytes,
                    "time_s": None,
                    "source": source,
                }
            )
        return sorted(rows, key=lambda row: (-row["bytes"], str(row)))

    def to_data(self) -> dict[str, Any]:
        """Return the JSON of `shardsim verify`; what host devices cannot say is null."""
        return answer(
            "host",
            self.ok,
            loss_rel_error=self.loss_error,
            grad_rel_error=self.gradient_error,
            collectives=[one.to_data() for one in self.collectives.table],
            unplanned=self.unplanned(),
        )


def verify_host(
    plan: PlanOrPath, devices: int = 8, scale: str = "tiny", progress: Progress | None = None
) -> dict[str, Any]:
    """Run a plan on host devices and compare it with the unsharded model.

    `scale` "tiny" shrinks model and mesh first (see `shardsim.xla.shrink`), "full" runs the plan
    as it is, in its own precision. The result has the keys of `shardsim verify --json`.
    """
    plan, say = as_plan(plan), progress or (lambda text: None)
    if scale not in ("tiny", "full"):
        raise PlanError(f"verify: scale: {scale!r} is not possible; choose from: tiny, full")
    if scale == "tiny":
        plan, lost = shrink(plan, devices)
        for text in lost:
            say(text)
    sizes = ", ".join(f"{axis.name} {axis.size}" for axis in plan.mesh)
    if plan.machine.devices > devices:
        raise PlanError(f"verify: the plan needs {plan.machine.devices} devices, not {devices}")
    say(f"running {STEPS} steps ({plan.execution}) on {plan.machine.devices} host devices: {sizes}")
    with HostDevices(devices) as host:
        result = host.compare(plan)
    say(
        f"relative errors: loss {result.loss_error:.1e}, gradients {result.gradient_error:.1e}, "
        f"updated parameters {result.update_error:.1e}"
    )
    for one in result.collectives.differences:
        what = f"{one.kind} over {', '.join(one.mesh_axes)} ({one.purpose})"
        say(f"{what}: {one.planned_bytes:.0f} bytes planned, {one.compiled_bytes:.0f} compiled")
    return result.to_data()
