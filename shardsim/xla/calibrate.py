"""Measuring this machine: host devices as a chip of `hardware/`.

Host devices are threads of one CPU. Each is a "chip" behind a switch, its links are copies in
memory, and a collective starts when all its threads have met. Everything is measured with all
devices at work, so that sharing cores and memory is in the figures: with eight devices on two
cores, one device has an eighth of what the cores do together. Times are of all cores
(`bench_worker.taken`), so that others' work on the machine is not in them.

A collective takes several times as long within a step as alone: its members come at different
times, and each that waits gives its core away. What the step of a small ViT with gathered weights
takes beyond its kernels says by how much.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np
import yaml

from shardsim.cost.predict import predict
from shardsim.emit.specs import plan_data
from shardsim.machine import Machine, chip_from_text
from shardsim.machine.kernels import Kernels
from shardsim.ops.activate import ACTIVATE
from shardsim.ops.attend import SOFTMAX
from shardsim.xla.hlo.collect import sent_bytes
from shardsim.xla.host import HostDevices, Progress
from shardsim.xla.host_plans import learned_plan

# Rows by contraction by columns: squares, and what layers of a small model have on one device.
MATMUL_SHAPES = (
    (128, 128, 128),
    (256, 256, 256),
    (256, 256, 1024),
    (512, 256, 256),
    (512, 512, 512),
    (2048, 256, 128),
    (1024, 1024, 1024),
)
COLLECTIVE_KINDS = ("all-gather", "reduce-scatter", "all-reduce")
COLLECTIVE_ELEMENTS = (2**12, 2**16, 2**19)
STREAM_ELEMENTS = 2**22  # 16 MiB a device, beyond any cache's share
TRANSPOSE_SIDE = 512
ACTIVATE_ELEMENTS = 2**18  # 1 MiB a device, in the caches


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds of each bench, with all devices at work."""

    matmuls: Mapping[tuple[int, int, int], float]  # by (m, k, n), float32
    collectives: Mapping[tuple[str, int, int], float]  # by (kind, elements, members), float32
    stream_s: float  # reading and writing STREAM_ELEMENTS once
    transpose_s: float  # a matrix of TRANSPOSE_SIDE x TRANSPOSE_SIDE
    activate_s: float  # gelu on each of ACTIVATE_ELEMENTS
    waits: float = 1.0  # what a collective takes within a step, over what it takes alone


def calibrate_cpu(devices: int = 8, progress: Progress | None = None) -> str:
    """Measure `devices` host devices and return a hardware file's text for them.

    Matmul rate by shape, memory bandwidth, multiply-add rate, and collectives by kind, size and
    members. The load of the machine is noted, because others' work makes every figure worse.
    """
    say = progress or (lambda text: None)
    load = os.getloadavg()[0]
    with HostDevices(devices, module="shardsim.xla.bench_worker", flags="") as host:

        def bench(**request: Any) -> float:
            taken = float(host.ask(request)["seconds"])
            say(f"{' '.join(str(value) for value in request.values())}: {taken * 1e3:.3f} ms")
            return taken

        matmuls = {(m, k, n): bench(bench="matmul", m=m, k=k, n=n) for m, k, n in MATMUL_SHAPES}
        collectives = {
            (kind, elements, group): bench(
                bench="collective", kind=kind, elements=elements, group=group
            )
            for kind in COLLECTIVE_KINDS
            for elements in COLLECTIVE_ELEMENTS
            for group in sorted({2, devices})
        }
        measured = Measured(
            matmuls=matmuls,
            collectives=collectives,
            stream_s=bench(bench="stream", elements=STREAM_ELEMENTS),
            transpose_s=bench(bench="transpose", side=TRANSPOSE_SIDE),
            activate_s=bench(bench="activate", elements=ACTIVATE_ELEMENTS),
        )
        where = (
            f"shardsim calibrate, {date.today().isoformat()}, {platform.machine()}, "
            f"{os.cpu_count()} cores as {devices} host devices, load {load:.1f} before, "
            f"jax {version('jax')}"
        )
        chip = chip_from_text(hardware_file(where, devices, measured), where)
        plan = learned_plan(Machine(chip=chip, shape=(devices,)))
        step_s = float(host.ask({"bench": "step", "data": plan_data(plan)})["seconds"])
    say(f"step of a small ViT with gathered weights: {step_s * 1e3:.3f} ms")
    measured = replace(measured, waits=waits(predict(plan).time, step_s))
    return hardware_file(where, devices, measured)


def waits(planned: Mapping[str, float], step_s: float) -> float:
    """Return how many times as long as planned the collectives of a step took, at least once.

    `planned` is the time of the step by what takes it, nothing beside a collective.
    """
    moved_s = planned["exposed_comm_s"]
    return max(1.0, (step_s - (sum(planned.values()) - moved_s)) / moved_s)


def _line(amounts: Sequence[float], starts: Sequence[float], times: Sequence[float]) -> Any:
    """Return (seconds per amount, seconds per start) with the least squared relative errors.

    Both stay positive: a negative one is replaced by nothing, and the other fitted alone.
    """
    rows = np.array([amounts, starts]).T / np.array(times)[:, None]
    slope, start = np.linalg.lstsq(rows, np.ones(len(times)), rcond=None)[0]
    if slope > 0 and start > 0:
        return float(slope), float(start)
    alone = [float(column.sum() / (column @ column)) for column in rows.T]
    return (alone[0], 1e-9) if start <= 0 else (1e-15, alone[1])


def hardware_file(where: str, devices: int, measured: Measured) -> str:
    """Return a hardware file's text from measured times; `where` begins every source.

    An operation takes its time at the sustained rate and a start; so does a collective, which as
    in the cost model is two for an all-reduce.
    """
    flops = {shape: 2.0 * shape[0] * shape[1] * shape[2] for shape in measured.matmuls}
    per_flop_s, overhead_s = _line(
        list(flops.values()), [1.0] * len(flops), list(measured.matmuls.values())
    )
    by_shape = ", ".join(
        f"{'x'.join(map(str, shape))}: {flops[shape] / taken / 1e9:.1f}"
        for shape, taken in measured.matmuls.items()
    )
    per_byte_s, start_s = _line(
        [sent_bytes(kind, 4.0 * n, group) for kind, n, group in measured.collectives],
        [2.0 if kind == "all-reduce" else 1.0 for kind, _, _ in measured.collectives],
        list(measured.collectives.values()),
    )

    def figure(value: Any, what: str, status: str = "measured") -> dict[str, Any]:
        return {"value": value, "source": f"{where}; {what}", "status": status}

    stream = 8.0 * STREAM_ELEMENTS / measured.stream_s
    in_step = f"within a step {measured.waits:.2f} times as long as alone"
    kernels = Kernels(
        contraction_start=0.0,
        scores_hbm_efficiency=1.0,
        sum_hbm_efficiency=1.0,
        copy_hbm_efficiency=1.0,
        transpose_hbm_efficiency=min(1.0, 8.0 * TRANSPOSE_SIDE**2 / measured.transpose_s / stream),
        optimizer_hbm_efficiency=1.0,
        attention_efficiency=1.0,
        attention_gradient_efficiency=1.0,
        softmax_ops=SOFTMAX.ops,
        softmax_gradient_ops=SOFTMAX.gradient_ops,
        fitted_to=f"{where}; transposes of a square of {TRANSPOSE_SIDE}; all else as streams, and "
        "attention as matmuls and gelu, assumed",
        date=date.today().isoformat(),
        versions={"jax": version("jax")},
    )
    data = {
        "name": "host",
        "title": "host",
        "kind": "cpu",
        "cores_per_chip": figure(1, "a host device counts as one", "assumed"),
        "devices_per_chip": figure(1, "a host device counts as one", "assumed"),
        "names_count": figure("chips", "a host device counts as one", "assumed"),
        "peak_flops": {
            "bf16": figure(
                1.0 / per_flop_s, f"float32 matmuls, slope over size; GFLOP/s by shape: {by_shape}"
            )
        },
        "mxu_dim": figure(8, "width of a vector register", "assumed"),
        "vector_flops": figure(
            ACTIVATE.fused * ACTIVATE_ELEMENTS / measured.activate_s, "gelu in the caches"
        ),
        "hbm_bytes": figure(4e9, "memory is not looked at", "assumed"),
        "hbm_usable_bytes": figure(4e9, "memory is not looked at", "assumed"),
        "hbm_bytes_per_s": figure(stream, "16 MiB in and out"),
        "onchip_bytes": figure(262144, "share of a cache", "assumed"),
        "interconnect": figure("switch", "copies in memory, from any to any", "assumed"),
        "torus_dims": figure(1, "one switched axis", "assumed"),
        "link_bytes_per_s": figure(1.0 / per_byte_s, "collectives, slope over size"),
        "hop_latency_s": figure(0.0, "in collective_overhead_s", "assumed"),
        "wrap": figure("none", "a switch has no ends to join", "assumed"),
        "max_slice": figure([devices], "the devices that were measured", "assumed"),
        "twistable": figure(False, "a switch has no torus to twist", "assumed"),
        "chips_per_host": figure(devices, "one host", "assumed"),
        "host_shape": figure([devices], "one host", "assumed"),
        "dcn_bytes_per_s": figure(1e9, "not used by one host", "assumed"),
        "dcn_hop_latency_s": figure(0.0, "not used by one host", "assumed"),
        "matmul_efficiency": figure(1.0, "the rate is a measured one", "assumed"),
        "hbm_efficiency": figure(1.0, "the rate is a measured one", "assumed"),
        "link_efficiency": figure(1.0 / measured.waits, in_step),
        "dcn_efficiency": figure(1.0, "not used by one host", "assumed"),
        "op_overhead_s": figure(overhead_s, "matmuls, extrapolated to no size"),
        "collective_overhead_s": figure(
            start_s * measured.waits, f"collectives, extrapolated to no bytes; {in_step}"
        ),
        "kernels": kernels.to_data(),
    }
    text: str = yaml.safe_dump(data, sort_keys=False, width=96)
    return text
