"""Verification against host devices: a plan's tiny copy is run beside the unsharded model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from shardsim.emit.runtime.host import thread_variables
from shardsim.emit.shrink import shrink
from shardsim.emit.specs import plan_data
from shardsim.errors import PlanError, ShardsimError
from shardsim.plan import Plan, PlanOrPath, as_plan
from shardsim.xla.compare import UNPLANNED, Comparison, answer
from shardsim.xla.hlo import read_hlo

STEPS = 2
LARGEST_ERROR = 1e-5  # relative, of loss, gradients and updated parameters in float32

# Compile fast rather than well: the steps run twice on tiny arrays. (Without fusions written as
# MLIR, XLA compiles these steps in half the time; small loops would then go into calls.)
# Combined all-reduces would mix what was planned with what was not.
_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_disable_hlo_passes=all-reduce-combiner,"
    "cpu-all-reduce-combiner,small-while-loop-hoisting"
)

# How XLA's log begins its lines: severity and date, time, thread, file and line.
_LOGGED = re.compile(r"^(?P<severity>[IWEF])\d{4} .*?\] (?P<text>.*)$", re.MULTILINE)
_LAST_BYTES = 20_000

Progress = Callable[[str], None]


def host_environment(devices: int, flags: str = "") -> dict[str, str]:
    """Return the variables with which a process has `devices` host devices, and XLA's `flags`."""
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}".strip(),
        **thread_variables(devices),
    }


class HostDevices:
    """A process with `devices` host devices that runs plans one after another.

    Its environment is its own, so the caller's JAX (if any) keeps the devices it has.
    """

    def __init__(
        self, devices: int = 8, *, module: str = "shardsim.xla.worker", flags: str = _FLAGS
    ) -> None:
        self.devices = devices
        environment = os.environ | host_environment(devices, flags)
        environment["TF_CPP_MIN_LOG_LEVEL"] = "2"
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )

    def __enter__(self) -> HostDevices:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return the answer; see `shardsim.xla.worker`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        if not line:
            raise ShardsimError(self._why_it_ended())
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise ShardsimError(f"the plan did not run on host devices: {told['error']}")
        return told

    def _why_it_ended(self) -> str:
        """Return one line on a process that gives no more answers, with its last message."""
        if missing := [name for name in ("jax", "optax") if find_spec(name) is None]:
            return f"host devices need {' and '.join(missing)}: pip install 'shardsim[jax]'"
        code = self._process.wait()
        how = f"ended with exit status {code}"
        if code < 0:
            how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LAST_BYTES))
        text = self._log.read().decode(errors="replace")
        logged = [(line["severity"], line["text"]) for line in _LOGGED.finditer(text)]
        said = (
            [words for severity, words in logged if severity == "F"]
            or [words for severity, words in logged if severity == "E"]
            or [line.strip() for line in text.splitlines() if line.strip()]
        )
        return f"the process with host devices {how}{f': {said[-1]}' if said else ''}"

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
