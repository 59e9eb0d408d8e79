"""Results as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shardsim.cli.output import table
from shardsim.cost.words import HBM, PARTS
from shardsim.plan.words import mesh_text, techniques
from shardsim.units import show_bytes, show_percent, show_time

if TYPE_CHECKING:
    from shardsim.cost.predict import Prediction


def prediction_text(item: Prediction) -> str:
    """Return one prediction in full."""
    plan = item.plan
    capacity = item.hbm["capacity_bytes"]
    verdict = "fits" if item.fits else "DOES NOT FIT"
    lines = [
        f"{plan.model.name} on {plan.machine.name} ({plan.machine.chips:,} chips), "
        f"batch {plan.batch:,} x {plan.sequence:,} tokens",
        f"mesh: {mesh_text(plan)}",
        f"plan: {techniques(plan)}",
        "",
        f"MFU {show_percent(item.mfu)}   HFU {show_percent(item.hfu)}   "
        f"step {show_time(item.step_time_s)}   {item.tokens_per_s_per_chip:,.1f} tokens/s/chip",
        f"HBM {show_bytes(item.hbm['peak_bytes'])} of {show_bytes(capacity)} per device, "
        f"at the {item.peak_moment}: {verdict}",
        f"limited by: {item.limited_by}",
        "",
        table(
            ["step time", "seconds", "share"],
            [
                [PARTS[name], f"{value:.4g}", show_percent(value / item.step_time_s)]
                for name, value in item.time.items()
            ],
        ),
        "",
        table(
            ["HBM per device", "GiB"],
            [[text, f"{item.hbm[name] / 2**30:.2f}"] for name, text in HBM.items()],
        ),
    ]
    if item.collectives:
        lines += ["", collectives_text(item)]
    lines += [f"warning: {text}" for text in item.warnings]
    return "\n".join(lines)


def collectives_text(item: Prediction) -> str:
    """Return the collectives of a step as a table."""
    return table(
        ["collective", "mesh axes", "of", "sent per device", "count", "time s", "exposed s"],
        [
            [
                use.kind,
                ", ".join(use.mesh_axes) or "-",
                use.purpose,
                show_bytes(use.bytes_per_chip),
                f"{use.count:,.0f}",
                f"{use.time_s:.4g}",
                f"{use.exposed_s:.4g}",
            ]
            for use in item.collectives
        ],
    )


def plans_text(items: Sequence[Prediction]) -> str:
    """Return several plans as a table, one line each."""
    several = len({item.plan.machine.name for item in items}) > 1
    rows: list[list[Any]] = []
    for rank, item in enumerate(items, 1):
        plan = item.plan
        tensor = bool(plan.parameters.get("heads"))
        rows.append(
            [
                rank,
                *([plan.machine.name] if several else []),
                mesh_text(plan),
                plan.remat.name,
                plan.microbatches,
                plan.overlap.matmul if tensor else "-",
                f"{100 * item.mfu:.1f}",
                f"{item.step_time_s:.4g}",
                f"{100 * item.time['exposed_comm_s'] / item.step_time_s:.1f}",
                f"{item.hbm['peak_bytes'] / 2**30:.1f}",
                item.limited_by,
            ]
        )
    return table(
        [
            "#",
            *(["slice"] if several else []),
            "mesh (torus axes)",
            "remat",
            "microbatches",
            "collective matmul",
            "MFU %",
            "step s",
            "exposed %",
            "HBM GiB",
            "limited by",
        ],
        rows,
    )


def model_rows(names: Sequence[str], load: Any) -> str:
    """Return models as a table."""
    rows = []
    for name in names:
        model = load(name)
        rows.append(
            [
                name,
                f"{model.parameters / 1e9:,.3f} B",
                model.layers,
                model.embed,
                model.mlp,
                f"{model.heads} x {model.head_dim}",
                model.kv_heads,
                "parallel" if model.parallel_block else "serial",
                model.sequence,
            ]
        )
    headers = [
        "model",
        "parameters",
        "layers",
        "embed",
        "mlp",
        "heads",
        "kv heads",
        "block",
        "tokens",
    ]
    return table(headers, rows)
