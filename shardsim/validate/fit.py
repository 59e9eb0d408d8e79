"""Where the fitted constants come from: `python -m shardsim.validate.fit` prints them anew.

One constant is fitted for each family of TPUs, one for all of them, and none for a model:

- `matmul_efficiency`, what large matmuls sustain inside a real step, of the matrix unit's peak,
  everything else being as the compiler estimates it (`calibrated` costs, `trainer`). It stands for
  what the formulas leave out (scalar work, clock), and lies near the rate of a matmul on its own,
  which the hardware file's note gives. v4 is fitted to its five 22B and 52B rows by least squares
  of the logarithm of the error; every other family to one row: the one that leaves the smallest
  largest error over `ROWS` of the family.
- The clock that 500 W leave an H100, as a share of that of 700 W, with which its matmuls and
  attention run: to `H100_500W`, one row. The hardware file has its products.
- `dcn_hop_latency_s`, one message between slices, from six pairs of runs on v4, v5e and v5p that
  differ in the number of slices alone: least squares of the logarithm of measured over predicted
  slow-down.

The vector operations of the attention kernel of 2023 are in `shardsim/ops/attend.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import log
from typing import Any

from shardsim.machine import Chip, load_chip
from shardsim.validate.rows import Run
from shardsim.validate.runs import predictions_of, published_runs

# Runs on one slice, and the same on several.
PAIRS = (
    ("maxtext-v4-22b-1x128", "maxtext-v4-22b-2x128"),
    ("maxtext-v4-22b-1x128", "maxtext-v4-22b-8x128"),
    ("maxtext-v5e-16b-1x256", "maxtext-v5e-16b-8x256"),
    ("maxtext-v5e-16b-1x256", "maxtext-v5e-16b-32x256"),
    ("maxtext-v5e-64b-1x256", "maxtext-v5e-64b-8x256"),
    ("maxtext-v5p-32b-1x64c", "maxtext-v5p-32b-2x64c"),
)
# Rows that a family's constant is chosen from, and held against.
ROWS = (
    "maxtext-v5e-16b-1x256",
    "maxtext-v5e-16b-8x256",
    "maxtext-v5e-16b-32x256",
    "maxtext-v5e-64b-1x256",
    "maxtext-v5e-64b-8x256",
    "maxtext-v5p-32b-1x64c",
    "maxtext-v5p-32b-2x64c",
    "maxtext-v5p-128b-1x128c",
    "maxtext-v5p-512b-1x512c",
    "maxtext-v5p-1024b-1x1024c",
    "recipes-v6e-llama2-70b",
    "recipes-v6e-llama31-70b-64",
    "recipes-v6e-llama31-8b-16",
    "recipes-tpu7x-llama31-70b-64-bf16",
)
V4_ROWS = (
    "maxtext-v4-22b-1x128",
    "maxtext-v4-22b-2x128",
    "maxtext-v4-22b-8x128",
    "maxtext-v4-22b-1x128-mar23",
    "maxtext-v4-52b-1x384",
)
H100_500W = "torchtitan-8b-8-bf16-compile"


def with_constants(run: Run, **constants: Any) -> Run:
    """Return `run` on a chip with some constants replaced."""
    plans = []
    for plan in run.plans:
        chip: Chip = replace(plan.machine.chip, **constants)
        plans.append(replace(plan, machine=replace(plan.machine, chip=chip)))
    return replace(run, plans=tuple(plans))


def log_error(run: Run) -> float:
    """Return log(predicted / measured) of tokens/s/chip, the median over a run's plans."""
    measured = run.rate()
    assert measured is not None
    rates = sorted(item.tokens_per_s_per_chip for item in predictions_of(run)[0])
    return log(rates[len(rates) // 2] / measured)


def solve(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where an increasing function crosses zero between two bounds, by bisection."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def fit_one(run: Run, **constants: float) -> float:
    """Return the matmul efficiency with which one run is predicted exactly."""
    return solve(
        lambda value: log_error(with_constants(run, matmul_efficiency=value, **constants)), 0.2, 1.0
    )


def slow_downs(runs: Mapping[str, Run], latency_s: float) -> list[float]:
    """Return log(predicted / measured) of what several slices cost, for each of `PAIRS`."""
    errors = {
        name: log_error(with_constants(runs[name], dcn_hop_latency_s=latency_s))
        for name in dict.fromkeys(name for pair in PAIRS for name in pair)
    }
    return [errors[several] - errors[one] for one, several in PAIRS]


def fit_dcn(runs: Mapping[str, Run]) -> float:
    """Return the latency of a message between slices that fits `PAIRS` best, to a microsecond."""
    return min(
        (step * 1e-6 for step in range(60, 121)),
        key=lambda latency_s: sum(error**2 for error in slow_downs(runs, latency_s)),
    )


def fit_v4(runs: Sequence[Run], latency_s: float) -> float:
    """Return the matmul efficiency that fits the v4 rows best."""

    def total(value: float) -> float:
        constants = {"matmul_efficiency": value, "dcn_hop_latency_s": latency_s}
        return sum(log_error(with_constants(run, **constants)) for run in runs)

    # The rate is nearly proportional to it, so the sum of squares is least where the sum is zero.
    return solve(total, 0.5, 1.0)


def fit_family(runs: Sequence[Run], **constants: float) -> tuple[float, str]:
    """Return the matmul efficiency of a family and the id of the row it is fitted to."""
    best = (float("inf"), 0.0, "")
    for candidate in runs:
        value = fit_one(candidate, **constants)
        worst = max(
            abs(log_error(with_constants(run, matmul_efficiency=value, **constants)))
            for run in runs
        )
        best = min(best, (worst, value, candidate.id))
    return best[1], best[2]


def at_clock(share: float) -> dict[str, Any]:
    """Return the rates of an H100 whose clock is `share` of that of 700 W."""
    fast = load_chip("h100")
    assert fast.kernels is not None
    kernels = replace(
        fast.kernels,
        attention_efficiency=fast.kernels.attention_efficiency * share,
        attention_gradient_efficiency=fast.kernels.attention_gradient_efficiency * share,
    )
    return {"matmul_efficiency": fast.matmul_efficiency * share, "kernels": kernels}


def fit_clock(run: Run) -> float:
    """Return the share of the clock with which one run on H100 of 500 W is predicted exactly."""
    return solve(lambda share: log_error(with_constants(run, **at_clock(share))), 0.4, 1.0)


def main() -> None:
    """Fit all constants again and print them."""
    runs = {run.id: run for run in published_runs()}
    latency_s = fit_dcn(runs)
    print(f"dcn_hop_latency_s {latency_s:.2e}")
    print(f"v4 matmul_efficiency {fit_v4([runs[name] for name in V4_ROWS], latency_s):.3f}")
    for family in ("v5e", "v5p", "v6e", "tpu7x"):
        rows = [run for name, run in runs.items() if run.family == family and name in ROWS]
        efficiency, row = fit_family(rows, dcn_hop_latency_s=latency_s)
        print(f"{family} matmul_efficiency {efficiency:.3f} fitted to {row}")
    share = fit_clock(runs[H100_500W])
    print(f"h100-500w clock {share:.3f} of h100's: {at_clock(share)}")


if __name__ == "__main__":
    main()
