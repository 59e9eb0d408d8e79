"""Measuring a GPU: the section `kernels` of its hardware file, with residuals."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shardsim.cost.costs import HEAD_DIM_TILE, KernelCosts
from shardsim.errors import HardwareError
from shardsim.machine import Chip, load_chip, override_chip
from shardsim.machine.catalog import find_name
from shardsim.machine.kernels import Kernels
from shardsim.program.gpu_rules import CUDNN_GRADIENT_PASSES
from shardsim.program.schedule import Work
from shardsim.xla.child import Child
from shardsim.xla.host import Progress
from shardsim.xla.profile.learn import hardware_file

SOURCE = "kernels on their own, by shardsim calibrate --device gpu"
Ask = Callable[..., float]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured: large enough to leave every cache, small enough for any GPU."""

    matmuls: tuple[tuple[int, int, int], ...] = (
        (1024, 1024, 1024), (16384, 1024, 1024), (16384, 1024, 4096), (16384, 4096, 1024),
        (16384, 4096, 6144), (16384, 6144, 5376), (8192, 8192, 8192), (16384, 30720, 6144),
    )  # fmt: skip
    elements: int = 2**27
    rows: int = 16384
    columns: int = 6144
    parameters: int = 2**27
    scores: tuple[int, int, int] = (2048, 197, 64)
    attention: tuple[tuple[int, int, int, int], ...] = ((8, 4096, 16, 64), (4, 4096, 32, 128))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was measured on one device."""

    chip: Chip  # with what was measured
    residuals: Mapping[str, float]  # by bench: estimated over measured, less one

    def text(self) -> str:
        """Return the hardware file of the chip."""
        return hardware_file(self.chip)


def calibrate_gpu(name: str | None = None, progress: Progress | None = None) -> Calibration:
    """Measure the device that JAX finds, as the chip called `name` or as it calls itself."""
    say = progress or (lambda text: None)
    with benches() as bench:
        here = bench.ask({"bench": "devices"})
        say(f"{here['kind']} ({here['platform']})")
        if here["platform"] != "gpu":
            raise HardwareError(
                f"calibrate: JAX finds no GPU here, but {here['count']} x {here['kind']}; "
                "for host devices say --device cpu"
            )
        found = find_name(name or here["kind"])
        if found is None:
            raise HardwareError(
                f"calibrate: no hardware file is called {name or here['kind']!r}; say which chip "
                "it is like, with --chip"
            )

        def ask(**request: Any) -> float:
            taken = float(bench.ask(request)["seconds"])
            say(f"{' '.join(map(str, request.values()))}: {1e3 * taken:.3f} ms")
            return taken

        return calibrated(load_chip(found), ask, here["versions"], Sizes())


def calibrated(chip: Chip, ask: Ask, versions: Mapping[str, str], sizes: Sizes) -> Calibration:
    """Return what `ask` (a bench and its sizes to seconds) says of a chip."""
    peak, hbm = chip.peak("bf16"), chip.hbm_bytes_per_s
    when = datetime.datetime.now(datetime.UTC).date().isoformat()

    def share(moved: float, taken_s: float) -> float:
        return min(1.0, moved / taken_s / hbm)

    times = {
        shape: ask(bench="matmul", m=shape[0], k=shape[1], n=shape[2]) for shape in sizes.matmuls
    }
    efficiency, start, start_s = matmul_constants(times, peak)
    heads, tokens, depth = sizes.scores
    pairs, arrays = float(heads * tokens**2), float(heads * tokens * depth)
    forward = [_attention(ask, shape, False) for shape in sizes.attention]
    both = [_attention(ask, shape, True) for shape in sizes.attention]
    moved_s = [2.0 * b * t * h * d * CUDNN_GRADIENT_PASSES / hbm for b, t, h, d in sizes.attention]
    backward = [all_s - one_s - m for all_s, one_s, m in zip(both, forward, moved_s, strict=True)]
    products, ops = attention_constants(sizes.attention, forward, 2, chip)
    gradient_products, gradient_ops = attention_constants(sizes.attention, backward, 5, chip)
    elements = sizes.elements
    figures = {
        "matmul_efficiency": efficiency,
        "hbm_efficiency": share(4.0 * elements, ask(bench="stream", elements=elements)),
        "op_overhead_s": start_s,
    }
    kernels = Kernels(
        contraction_start=start,
        scores_hbm_efficiency=share(
            8.0 * pairs + 8.0 * arrays, ask(bench="scores", heads=heads, tokens=tokens, depth=depth)
        ),
        sum_hbm_efficiency=share(
            8.0 * sizes.rows * sizes.columns,
            ask(bench="sums", rows=sizes.rows, columns=sizes.columns),
        ),
        copy_hbm_efficiency=share(4.0 * elements, ask(bench="copy", elements=elements)),
        transpose_hbm_efficiency=share(
            4.0 * elements, ask(bench="transpose", rows=elements // 1024, heads=16, depth=64)
        ),
        optimizer_hbm_efficiency=share(
            28.0 * sizes.parameters, ask(bench="optimizer", elements=sizes.parameters)
        ),
        attention_efficiency=products,
        attention_gradient_efficiency=gradient_products,
        softmax_ops=ops,
        softmax_gradient_ops=gradient_ops,
        fitted_to=SOURCE,
        date=when,
        versions=dict(versions),
    )
    told = {
        name: {"value": value, "source": f"{SOURCE}, {when}", "status": "measured"}
        for name, value in figures.items()
    }
    chip = override_chip(chip, figures)
    chip = replace(chip, kernels=kernels, figures={**chip.figures, **told})
    costs = KernelCosts(chip)
    residuals = {}
    for (m, k, n), taken_s in times.items():
        task = Work(
            name="",
            kind="matmul",
            m=m,
            k=k,
            n=n,
            matmuls=1,
            hbm_bytes=2.0 * (m * k + k * n + m * n),
        )
        residuals[f"matmul {m} x {k} x {n}"] = float(costs.estimate(task).total_s) / taken_s - 1.0
    return Calibration(chip=chip, residuals=residuals)


def matmul_constants(
    times: Mapping[tuple[int, int, int], float], peak: float
) -> tuple[float, float, float]:
    """Return the share of the peak, how much longer contractions seem, and the start, s.

    A matmul takes flops (1 + start / k) / (share x peak) + s: a line in three amounts, with the
    least squared relative errors of those that are not negative.
    """
    flops = np.array([2.0 * m * k * n for m, k, n in times])
    inner = np.array([float(k) for _, k, _ in times])
    taken = np.array(list(times.values()))
    columns = np.array([flops, flops / inner, np.ones(len(times))]) / taken
    chosen: list[int] = [0, 1, 2]
    while True:
        found, *_ = np.linalg.lstsq(columns[chosen].T, np.ones(len(times)), rcond=None)
        if (found > 0).all() or len(chosen) == 1:
            break
        worst = int(np.argmin(found[1:])) + 1 if found[0] > 0 else len(chosen) - 1
        del chosen[worst]
    slope, extra, start_s = (
        float(found[chosen.index(column)]) if column in chosen else 0.0 for column in range(3)
    )
    return min(1.0, 1.0 / (slope * peak)), extra / slope, start_s


def attention_constants(
    shapes: Sequence[tuple[int, int, int, int]], times: Sequence[float], products: int, chip: Chip
) -> tuple[float, float]:
    """Return the share of the peak of a kernel's products, and its vector operations for a pair.

    Two head sizes tell them apart: only products take longer with a larger one.
    """
    per_pair = [t / (b * s * s * h) for (b, s, h, _), t in zip(shapes, times, strict=True)]
    wide = [-(-d // HEAD_DIM_TILE) * HEAD_DIM_TILE for *_, d in shapes]
    slope = (per_pair[1] - per_pair[0]) / (wide[1] - wide[0])
    slope = max(slope, 2.0 * products / chip.peak("bf16"))
    rest_s = max(per_pair[0] - slope * wide[0], 1e-18)
    return 2.0 * products / slope / chip.peak("bf16"), rest_s * chip.vector_flops


def _attention(ask: Ask, shape: tuple[int, int, int, int], gradient: bool) -> float:
    batch, tokens, heads, depth = shape
    return ask(
        bench="attention", batch=batch, tokens=tokens, heads=heads, depth=depth, gradient=gradient
    )


def benches() -> Child:
    """Return a process that has the device and times what it is asked (see `kernel_bench`)."""
    return Child(
        "shardsim.xla.kernel_bench", {}, called="the process that measures", failing="not measured"
    )
