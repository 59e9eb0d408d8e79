"""Results as pandas frames, with units in the column names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from shardsim.cost.predict import Prediction
from shardsim.plan.words import mesh_text
from shardsim.planner.search import SearchResult
from shardsim.planner.whatif import Ablation, Sensitivity
from shardsim.report.roofline import matmul_points
from shardsim.report.timeline import layer_timelines
from shardsim.units import GIB
from shardsim.validate.runs import Validation
from shardsim.xla.tpu.agreement import Pair


def plans_frame(items: SearchResult | Iterable[Prediction]) -> pd.DataFrame:
    """Return one row per plan, in the order given.

    >>> from shardsim.cost.predict import predict
    >>> from shardsim.plan import load_plan
    >>> list(plans_frame([predict(load_plan("vit-22b-published-tp8"))]).chips)
    [1024]
    """
    predictions = items.predictions if isinstance(items, SearchResult) else items
    return pd.DataFrame([plan_row(item) for item in predictions])


def plan_row(item: Prediction) -> dict[str, Any]:
    """Return what a row of a table of plans holds."""
    plan = item.plan
    return {
        "plan": plan.name,
        "machine": plan.machine.name,
        "chips": plan.machine.chips,
        "mesh": mesh_text(plan),
        "remat": plan.remat.name,
        "microbatches": plan.microbatches,
        "collective_matmul": plan.overlap.matmul if plan.parameters.get("heads") else "",
        "mfu": item.mfu,
        "hfu": item.hfu,
        "step_time_s": item.step_time_s,
        "tokens_per_s_per_chip": item.tokens_per_s_per_chip,
        **item.time,
        "hbm_peak_gib": item.hbm["peak_bytes"] / GIB,
        "hbm_free_gib": (item.hbm["capacity_bytes"] - item.hbm["peak_bytes"]) / GIB,
        "fits": item.fits,
        "limited_by": item.limited_by,
    }


def computes_frame(item: Prediction) -> pd.DataFrame:
    """Return every computation of a step on one device, the longest first."""
    rows = [
        {
            "task": cost.task.name,
            "kind": cost.task.kind,
            "block": cost.block,
            "count": float(cost.count),
            "time_s": float(cost.time_s),
            "hbm_bound_s": float(cost.memory_s),
            "flops": float(cost.flops),
        }
        for cost in item.price.computes
        if float(cost.count) > 0
    ]
    frame = pd.DataFrame(rows).sort_values("time_s", ascending=False, kind="stable")
    return frame.reset_index(drop=True)


def collectives_frame(item: Prediction) -> pd.DataFrame:
    """Return the collectives of a step on one device, the longest first."""
    columns = ["kind", "mesh_axes", "of", "sent_bytes", "count", "time_s", "exposed_s"]
    rows = [
        [
            use.kind,
            ", ".join(use.mesh_axes),
            use.purpose,
            use.bytes_per_chip,
            use.count,
            use.time_s,
            use.exposed_s,
        ]
        for use in item.collectives
    ]
    return pd.DataFrame(rows, columns=columns)


def matmuls_frame(item: Prediction) -> pd.DataFrame:
    """Return every matmul of a step against the roofline of one device."""
    rows = [
        {
            "matmul": point.name,
            "group": point.group,
            "shape": point.shape,
            "count": point.count,
            "time_s": point.step_s,
            "flops_per_byte": point.flops_per_byte,
            "flops_per_s": point.flops_per_s,
            "of_peak": point.of_peak,
            "roof": point.bound,
        }
        for point in matmul_points(item)
    ]
    return pd.DataFrame(rows)


def timeline_frame(item: Prediction) -> pd.DataFrame:
    """Return the tasks of one layer's forward and backward pass, with start and duration."""
    rows = [
        {
            "pass": one.block,
            "stream": span.stream,
            "task": span.name,
            "kind": span.kind,
            "start_s": span.start_s,
            "duration_s": span.duration_s,
        }
        for one in layer_timelines(item)
        for span in one.spans
    ]
    return pd.DataFrame(rows)


def ablation_frame(base: Prediction, items: Sequence[Ablation]) -> pd.DataFrame:
    """Return what each technique is worth; `step_change` is a fraction of the plan's step."""
    rows = []
    for item in items:
        got = item.prediction
        rows.append(
            {
                "without": item.technique,
                "so": item.change if got else item.why,
                "mfu": got.mfu if got else None,
                "step_change": got.step_time_s / base.step_time_s - 1 if got else None,
                "fits": got.fits if got else None,
                "published": item.published,
            }
        )
    return pd.DataFrame(rows)


def sensitivity_frame(items: Sequence[Sensitivity]) -> pd.DataFrame:
    """Return the elasticity of the step time to each figure of the chip."""
    return pd.DataFrame(
        [
            {
                "figure": item.figure,
                "elasticity": item.elasticity,
                "step_time_s_at_110_percent": item.step_time_s_at_110,
                "mfu_at_110_percent": item.mfu_at_110,
            }
            for item in items
        ]
    )


def sweep_frame(
    rows: Iterable[tuple[Mapping[str, Any], Prediction | None, str]],
) -> pd.DataFrame:
    """Return a sweep, one row per combination; what makes no legal plan says why."""
    found = []
    for changes, item, why in rows:
        row: dict[str, Any] = dict(changes)
        if item is not None:
            row |= {
                "mfu": item.mfu,
                "step_time_s": item.step_time_s,
                "tokens_per_s_per_chip": item.tokens_per_s_per_chip,
                "hbm_peak_gib": item.hbm["peak_bytes"] / GIB,
                "fits": item.fits,
            }
        found.append(row | {"why_not": why})
    return pd.DataFrame(found)


def validation_frame(result: Validation) -> pd.DataFrame:
    """Return published runs beside their predictions, in tokens/s/chip; errors are fractions."""
    return pd.DataFrame(
        [
            {
                "run": row.id,
                "family": row.family,
                "measured": row.measured,
                "predicted": row.predicted,
                "error": row.error,
                "measured_mfu": row.measured_mfu,
                "predicted_mfu": row.predicted_mfu,
                "mean_mfu_error": row.baseline_error,
                "fitted": row.fitted,
            }
            for row in result.rows
        ]
    )


def compiled_frame(found: Sequence[Pair]) -> pd.DataFrame:
    """Return the kept compilations of the TPU compiler beside their predictions."""
    return pd.DataFrame(
        [
            {
                "group": pair.row["group"],
                "plan": pair.row["kind"],
                "compiled": pair.row["compiled"],
                "predicted_mfu": pair.predicted.mfu,
                "compiled_mfu": pair.row.get("mfu"),
                "predicted_step_time_s": pair.predicted.step_time_s,
                "compiled_step_time_s": pair.row.get("step_time_s"),
                "predicted_hbm_peak_gib": pair.predicted.hbm["peak_bytes"] / GIB,
                "compiled_hbm_peak_gib": (pair.row["peak_bytes"] or float("nan")) / GIB,
            }
            for pair in found
        ]
    )
