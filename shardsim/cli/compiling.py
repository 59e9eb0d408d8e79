"""What the commands that use the TPU compiler share: options, and results as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from shardsim.cli.output import note, table
from shardsim.units import show_bytes, show_percent, show_time

SHOWN = 12  # rows of what is unplanned


def compiler_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the compile service to a command."""
    for option in (
        click.option(
            "--no-cache", is_flag=True, help="Compile anew, and keep nothing that is compiled."
        ),
        click.option(
            "--scheduler", metavar="ADDRESS", help="Compile on a Dask cluster (needs distributed)."
        ),
        click.option(
            "--timeout",
            default=1200.0,
            show_default=True,
            type=click.FloatRange(1.0),
            help="Seconds that one compilation may take.",
        ),
        click.option(
            "--workers",
            default=1,
            show_default=True,
            type=click.IntRange(1, 256),
            help="Compilations side by side; each may take 4 GB.",
        ),
    ):
        function = option(function)
    return function


@contextmanager
def compiler(workers: int, timeout: float, scheduler: str | None, no_cache: bool) -> Iterator[Any]:
    """Give a `TpuCompiler` that tells on stderr how far it is."""
    from shardsim.xla.tpu import Cache, TpuCompiler
    from shardsim.xla.tpu.executors import dask_executor

    executor = dask_executor(scheduler) if scheduler else None
    cache = None if no_cache else Cache()
    with TpuCompiler(
        workers=workers, executor=executor, timeout_s=timeout, cache=cache, progress=note
    ) as service:
        yield service


def evidence_text(data: dict[str, Any]) -> str:
    """Return what `verify --against tpu` found as text."""
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    if data.get("problem"):
        return f"NOT VERIFIED: {data['problem']}\n" + _sizes(data) + f"\ncompiled with {versions}"
    verdict = "verified: it compiles and fits, collectives as planned"
    if not data["ok"]:
        verdict = "NOT VERIFIED: it compiles and fits, but not as planned"
    lines = [
        verdict,
        f"compiled with {versions}",
        "",
        _sizes(data),
        "",
        table(
            ["collective", "mesh axes", "planned", "compiled", "planned count", "compiled count"],
            [
                [
                    row["kind"],
                    ", ".join(row["mesh_axes"]) or "-",
                    show_bytes(row["planned_bytes"]),
                    show_bytes(row["compiled_bytes"]),
                    f"{row['planned_count']:,.0f}",
                    f"{row['compiled_count']:,.0f}",
                ]
                for row in data["collectives"]
            ],
        ),
    ]
    if data["unplanned"]:
        lines += ["", _unplanned(data["unplanned"])]
    lines += [f"warning: {text}" for text in data["warnings"]]
    return "\n".join(lines)


def _sizes(data: dict[str, Any]) -> str:
    """Return predicted and compiled figures side by side."""

    def both(name: str, pair: tuple[Any, Any], show: Callable[[float], str]) -> list[str]:
        wanted, got = pair
        if got is None:
            return [name, show(wanted), "-", "-"]
        change = f"{100 * (got / wanted - 1):+.1f} %" if wanted else "-"
        return [name, show(wanted), show(got), change]

    hbm, step, mfu = data["hbm"], data["step"], data["mfu"]
    compute, flops = data["compute"], data["flops"]
    rows = [
        both(
            f"HBM peak of {show_bytes(hbm['capacity_bytes'])}",
            (hbm["predicted_peak_bytes"], hbm["compiled_peak_bytes"]),
            show_bytes,
        ),
        both("FLOPs of a device", (flops["predicted"], flops["compiled"]), "{:.5g}".format),
        both("operations", (compute["predicted_s"], compute["compiled_s"]), show_time),
    ]
    if "exposed_comm" in data:
        exposed = data["exposed_comm"]
        pair = (exposed["predicted_s"], exposed["replayed_s"])
        rows.append(both("exposed communication", pair, show_time))
    rows += [
        both("step", (step["predicted_s"], step["replayed_s"]), show_time),
        both("MFU %", (mfu["predicted"], mfu["replayed"]), show_percent),
    ]
    return table(["", "predicted", "compiled", "difference"], rows)


def _unplanned(rows: list[dict[str, Any]]) -> str:
    """Return the costliest unplanned collectives and copies, and the sum of the rest."""
    shown, rest = rows[:SHOWN], rows[SHOWN:]
    cells = [
        [
            row["kind"],
            ", ".join(row["mesh_axes"]) or "-",
            show_bytes(row["bytes"]),
            show_time(row["exposed_s"]),
            f"{row['mfu_points']:.2f}",
            row["source"],
        ]
        for row in shown
    ]
    if rest:
        cells.append(
            [
                f"{len(rest)} more",
                "-",
                show_bytes(sum(row["bytes"] for row in rest)),
                show_time(sum(row["exposed_s"] for row in rest)),
                f"{sum(row['mfu_points'] for row in rest):.2f}",
                "",
            ]
        )
    return table(["unplanned", "mesh axes", "bytes", "costs", "MFU points", "from"], cells)


def ranked_text(outcomes: list[Any]) -> str:
    """Return plans as re-ranked by the compiler, one line each."""
    from shardsim.plan.words import mesh_text

    rows = []
    for number, item in enumerate(outcomes, 1):
        plan, made = item.searched.plan, item.compiled
        rows.append(
            [
                number if made else "-",
                mesh_text(plan),
                plan.remat.name,
                plan.microbatches,
                f"{100 * item.searched.mfu:.1f}",
                f"{100 * made.mfu:.1f}" if made else "-",
                f"{item.searched.step_time_s:.4g}",
                f"{made.step_time_s:.4g}" if made else "-",
                f"{item.searched.hbm['peak_bytes'] / 2**30:.1f}",
                f"{made.hbm['peak_bytes'] / 2**30:.1f}" if made else "-",
                item.problem or "",
            ]
        )
    return table(
        [
            "#",
            "mesh (torus axes)",
            "remat",
            "microbatches",
            "MFU % predicted",
            "compiled",
            "step s predicted",
            "compiled",
            "HBM GiB predicted",
            "compiled",
            "",
        ],
        rows,
    )
