"""Where the fitted constants come from: `python -m shardsim.validate.fit` prints them anew.

Two constants are fitted for v4, one for each other family of TPUs, and none for a model:

- `matmul_efficiency`, what large matmuls sustain inside a real step, of the matrix unit's peak.
  It stands for what the formulas leave out (layout copies, scalar work, clock), and lies below
  the rate of a matmul on its own, which the hardware file's note gives.
- `dcn_hop_latency_s`, one message between slices, on v4 from the runs on 2 and 8 slices; the
  other families take it over.

v4 is fitted to its five 22B and 52B rows by least squares of the logarithm of the error; every
other family to one row: the one that leaves the smallest largest error over the family's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log

from shardsim.machine import Chip
from shardsim.validate.rows import Run
from shardsim.validate.runs import predictions_of, published_runs

V4_ROWS = (
    "maxtext-v4-22b-1x128",
    "maxtext-v4-22b-2x128",
    "maxtext-v4-22b-8x128",
    "maxtext-v4-22b-1x128-mar23",
    "maxtext-v4-52b-1x384",
)


def with_constants(run: Run, **constants: float) -> Run:
    """Return `run` on a chip with some constants replaced."""
    plans = []
    for plan in run.plans:
        chip: Chip = replace(plan.machine.chip, **constants)  # type: ignore[arg-type]
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
        lambda value: log_error(with_constants(run, matmul_efficiency=value, **constants)),
        0.2,
        1.0,
    )


def fit_v4(runs: Sequence[Run]) -> tuple[float, float]:
    """Return matmul efficiency and DCN latency that fit the v4 rows best."""
    best = (float("inf"), 0.0, 0.0)
    for step in range(0, 51):
        latency_s = step * 2e-6

        def mean(value: float, latency_s: float = latency_s) -> float:
            errors = [
                log_error(with_constants(run, matmul_efficiency=value, dcn_hop_latency_s=latency_s))
                for run in runs
            ]
            return sum(errors) / len(errors)

        efficiency = solve(mean, 0.5, 1.0)
        squares = sum(
            log_error(
                with_constants(run, matmul_efficiency=efficiency, dcn_hop_latency_s=latency_s)
            )
            ** 2
            for run in runs
        )
        best = min(best, (squares, efficiency, latency_s))
    return best[1], best[2]


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


def main() -> None:
    """Fit all constants again and print them."""
    runs = {run.id: run for run in published_runs()}
    efficiency, latency_s = fit_v4([runs[name] for name in V4_ROWS])
    print(f"v4 matmul_efficiency {efficiency:.3f} dcn_hop_latency_s {latency_s:.2e}")
    families = {run.family for run in runs.values()} - {"v4"}
    for family in sorted(families):
        rows = [run for run in runs.values() if run.family == family and run.rate()]
        value, row = fit_family(rows, dcn_hop_latency_s=latency_s)
        print(f"{family} matmul_efficiency {value:.3f} fitted to {row}")


if __name__ == "__main__":
    main()
