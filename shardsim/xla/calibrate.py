"""Measuring this machine: host devices as a chip of `hardware/`, and plans run on them.

Host devices are threads of one CPU: each is a "chip" behind a switch, its links are copies in
memory. Everything is measured with all devices at work, so that sharing cores and memory is in
the figures.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import yaml

from shardsim.cost.predict import predict
from shardsim.emit.specs import plan_data
from shardsim.errors import ShardsimError
from shardsim.machine import Machine
from shardsim.plan import Plan, plan_from_data
from shardsim.xla.host import HostDevices, Progress

MATMUL_SIZES = (64, 128, 256, 512, 1024)
COLLECTIVE_ELEMENTS = (2**14, 2**17, 2**20)
STREAM_ELEMENTS = 2**23  # 32 MiB, beyond any cache's share
VECTOR_ELEMENTS = 2**14


def calibrate_cpu(devices: int = 8, progress: Progress | None = None) -> str:
    """Measure `devices` host devices and return a hardware file's text for them.

    matmul rate by size, memory bandwidth, multiply-add rate, and the time of collectives by size.
    """
    say = progress or (lambda text: None)
    with HostDevices(devices, module="shardsim.xla.bench_worker", flags="") as host:

        def bench(**request: Any) -> float:
            taken = float(host.ask(request)["seconds"])
            say(f"{' '.join(str(value) for value in request.values())}: {taken * 1e3:.3f} ms")
            return taken

        matmuls = {size: bench(bench="matmul", size=size) for size in MATMUL_SIZES}
        stream_s = bench(bench="stream", elements=STREAM_ELEMENTS)
        vector_s = bench(bench="vector", elements=VECTOR_ELEMENTS)
        gathers = {
            n: bench(bench="collective", kind="all-gather", elements=n) for n in COLLECTIVE_ELEMENTS
        }
    where = f"shardsim calibrate on {platform.processor() or platform.machine()}, {devices} host "
    where += f"devices, jax {version('jax')}"
    return hardware_file(where, devices, matmuls, gathers, stream_s, vector_s)


def hardware_file(
    where: str,
    devices: int,
    matmuls: Mapping[int, float],
    gathers: Mapping[int, float],
    stream_s: float,
    vector_s: float,
) -> str:
    """Return a hardware file's text from measured times.

    `matmuls` maps the side of a square float32 matmul to its seconds, `gathers` the elements of
    an all-gathered float32 array to those of the all-gather; `where` begins every source.
    """
    rates = {size: 2.0 * size**3 / taken for size, taken in matmuls.items()}
    sent = np.array([4.0 * n * (devices - 1) / devices for n in gathers])
    slope, start_s = np.polyfit(sent, np.array(list(gathers.values())), 1)
    peak = max(rates.values())
    by_size = ", ".join(f"{size}: {rate / 1e9:.1f}" for size, rate in rates.items())
    # Time beyond the peak rate on the smallest matmul is the cost of starting an operation.
    least = min(matmuls)
    overhead_s = max(1e-7, matmuls[least] - 2.0 * least**3 / peak)

    def figure(value: Any, what: str, status: str = "measured") -> dict[str, Any]:
        return {"value": value, "source": f"{where}; {what}", "status": status}

    data = {
        "name": "host",
        "title": "host",
        "kind": "cpu",
        "cores_per_chip": figure(1, "a host device counts as one", "assumed"),
        "devices_per_chip": figure(1, "a host device counts as one", "assumed"),
        "names_count": figure("chips", "a host device counts as one", "assumed"),
        "peak_flops": {"bf16": figure(peak, f"float32 matmuls, GFLOP/s by size: {by_size}")},
        "mxu_dim": figure(8, "width of a vector register", "assumed"),
        "vector_flops": figure(128.0 * VECTOR_ELEMENTS / vector_s, "multiply-adds in cache"),
        "hbm_bytes": figure(4e9, "memory is not looked at", "assumed"),
        "hbm_usable_bytes": figure(4e9, "memory is not looked at", "assumed"),
        "hbm_bytes_per_s": figure(8.0 * STREAM_ELEMENTS / stream_s, "read and write 32 MiB"),
        "onchip_bytes": figure(262144, "share of a cache", "assumed"),
        "interconnect": figure("switch", "copies in memory, from any to any", "assumed"),
        "torus_dims": figure(1, "one switched axis", "assumed"),
        "link_bytes_per_s": figure(float(1.0 / max(slope, 1e-15)), "all-gathers, slope over size"),
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
        "link_efficiency": figure(1.0, "the rate is a measured one", "assumed"),
        "dcn_efficiency": figure(1.0, "not used by one host", "assumed"),
        "op_overhead_s": figure(overhead_s, f"a {least}^3 matmul beyond its time at peak"),
        "collective_overhead_s": figure(
            float(max(start_s, 1e-7)), "all-gathers, extrapolated to no bytes"
        ),
    }
    text: str = yaml.safe_dump(data, sort_keys=False, width=96)
    return text


# A small ViT, and ways to train it on eight devices.
_MODEL = {
    "name": "vit-small-host",
    "family": "vit",
    "layers": 4,
    "embed": 256,
    "heads": 8,
    "patch": 4,
    "image": 32,
    "pooling": "mean",
    "classes": 16,
    "parallel_block": True,
}
_TENSOR = {axis: ["model"] for axis in ("heads", "mlp")}


def measured_plans(machine: Machine) -> list[Plan]:
    """Return plans of a small ViT that differ in one technique or another, for eight devices."""
    fsdp = {"embed": ["fsdp"]}
    both = fsdp | _TENSOR
    rows, tensor = {"batch": ["fsdp"]}, {"model": 8}
    sequence, embed = {"seq": ["model"]}, {"embed": ["model"]}
    wide, square = {"fsdp": 4, "model": 2}, {"fsdp": 2, "model": 4}
    off = {"overlap": {"matmul": "off"}}
    table: dict[str, tuple[dict[str, int], Any, Any, dict[str, Any]]] = {
        "data": ({"data": 8}, {}, {"batch": ["data"]}, {}),
        "data, nothing kept": ({"data": 8}, {}, {"batch": ["data"]}, {"remat": "full"}),
        "fsdp": ({"fsdp": 8}, fsdp, rows, {}),
        "fsdp, nothing kept": ({"fsdp": 8}, fsdp, rows, {"remat": "full"}),
        "fsdp, four microbatches": ({"fsdp": 8}, fsdp, rows, {"microbatches": 4}),
        "fsdp and tensor 2": (wide, both, rows | sequence, {}),
        "fsdp and tensor 4": (square, both, rows | sequence, {}),
        "fsdp and tensor 4, plain": (square, both, rows | sequence, off),
        "tensor 4 on embed": (square, both, rows | embed, {}),
        "tensor 4, whole residual": (square, both, rows, {}),
        "tensor 8": (tensor, _TENSOR, sequence, {}),
        "tensor 8, plain": (tensor, _TENSOR, sequence, off),
    }
    return [
        plan_from_data(
            {
                "name": name,
                "model": _MODEL,
                "machine": machine.name,
                "batch": 32,
                "mesh": mesh,
                "rules": {"parameters": parameters, "activations": activations},
                "precision": {"compute": "f32", "reduce": "f32"},
                "attention": "unfused",
                "remat": "none",
                **more,
            },
            name,
            machine=machine,
        )
        for name, (mesh, parameters, activations, more) in table.items()
    ]


def measure_host(machine: Machine, progress: Progress | None = None) -> dict[str, Any]:
    """Predict and time plans of a small ViT on the host devices that `machine` describes.

    Returns rows {plan, predicted_s, measured_s, error} (error: signed, a fraction), the median
    absolute error, and Spearman's rank correlation of predicted and measured times.
    """
    say = progress or (lambda text: None)
    rows: list[dict[str, Any]] = []
    with HostDevices(machine.devices, module="shardsim.xla.bench_worker", flags="") as host:
        for plan in measured_plans(machine):
            predicted_s = predict(plan).step_time_s
            measured_s = float(host.ask({"bench": "step", "data": plan_data(plan)})["seconds"])
            error = predicted_s / measured_s - 1.0
            rows.append(
                {
                    "plan": plan.name,
                    "predicted_s": predicted_s,
                    "measured_s": measured_s,
                    "error": error,
                }
            )
            say(f"{plan.name}: predicted {predicted_s:.4f} s, measured {measured_s:.4f} s")
    return {
        "rows": rows,
        "median_abs_error": statistics.median(abs(row["error"]) for row in rows),
        "rank_correlation": rank_correlation(
            [row["predicted_s"] for row in rows], [row["measured_s"] for row in rows]
        ),
    }


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two lists without ties.

    >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
    0.5
    """
    if len(a) != len(b) or len(a) < 2:
        raise ShardsimError("a rank correlation needs two lists of one length, two or more")
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    apart = float(np.sum((ranks[0] - ranks[1]) ** 2))
    return float(1.0 - 6.0 * apart / (len(a) * (len(a) ** 2 - 1)))
