"""`shardsim timeline`, and the event level of `shardsim predict`."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from shardsim.cli.options import as_option, asked, compiled_option, plan_argument, what_if_options
from shardsim.cli.output import (
    STDOUT,
    FilePath,
    check_output,
    emit_json,
    json_option,
    note,
    progress_line,
    write_output,
)
from shardsim.errors import PlanError, ShardsimError

if TYPE_CHECKING:
    from shardsim.plan import Plan

PICTURES = (".png", ".svg", ".pdf")


def simulated(
    plan: Any, what_ifs: dict[str, Any], compiled: bool, implementation: str | None, **options: Any
) -> Any:
    """Return the step as the event simulation plays it: the plan's, or as it is compiled."""
    _require("simpy", "networkx")
    healthy, (plan, perturbation) = plan, _perturbed(plan, what_ifs)
    if not compiled:
        from shardsim.simulate import simulate_plan

        result = simulate_plan(
            plan,
            implementation=implementation,
            perturbation=perturbation,
            progress=progress_line("simulating"),
            **options,
        )
        if not asked(what_ifs) or options:
            return result
        return _beside(result, simulate_plan(healthy, implementation=implementation))
    from shardsim.cli.compiling import compiler
    from shardsim.simulate.spare import refuse_broken
    from shardsim.xla.tpu.compiled import evidence_of
    from shardsim.xla.tpu.simulated import simulate_evidence

    refuse_broken(plan.machine, perturbation.broken)  # before it is compiled
    with compiler() as service:
        made = evidence_of(plan, service)
    result = simulate_evidence(made, perturbation=perturbation, **options)
    if not asked(what_ifs) or options or plan is not healthy:
        return result
    return _beside(result, simulate_evidence(made))


def _beside(result: Any, healthy: Any) -> Any:
    """Return a step with something slow or broken, with what it takes without that beside it."""
    outcome = replace(result.events, healthy_step_time_s=healthy.step_time_s)
    return replace(result, events=outcome)


def predictor(fidelity: str) -> Any:
    """Return the function that predicts a plan with closed forms, or plays its step."""
    if fidelity == "analytic":
        from shardsim.cost.predict import predict

        return predict
    _require("simpy", "networkx")
    from shardsim.simulate import simulate_plan

    return simulate_plan


def _perturbed(plan: Any, what_ifs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the plan and the perturbation that the options ask for."""
    from shardsim.simulate import twisted, what_if

    options = dict(what_ifs)
    if options.pop("twisted"):
        plan = twisted(plan)
    perturbation = what_if(plan.machine, **options)
    if perturbation.jitter > 0:
        note(f"jitter: each of {plan.machine.devices:,} devices is simulated for itself")
    return plan, perturbation


def _require(*modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        extras = dict.fromkeys("report" if one == "matplotlib" else "simulate" for one in missing)
        raise ShardsimError(
            f"{' and '.join(missing)} missing; pip install 'shardsim[{','.join(extras)}]'"
        )


@click.command()
@click.option(
    "-o",
    "--output",
    required=True,
    type=FilePath(dir_okay=False),
    help="trace.json or - (stdout): the step, for Perfetto; layer.png or .svg: one layer as a "
    "picture.",
)
@plan_argument
@as_option
@compiled_option
@what_if_options
@json_option
def timeline(
    plan: Plan,
    output: str,
    implementation: str | None,
    compiled: bool,
    what_ifs: dict[str, Any],
    as_json: bool,
) -> None:
    """Simulate a step on the torus and write when everything runs.

    The trace opens in https://ui.perfetto.dev and chrome://tracing.

    \b
    Examples:
      shardsim timeline vit-22b-published-tp8 -o trace.json
      shardsim timeline vit-22b-published-tp8 -o layer.png --dead-link 0,0,0-0,1,0
      shardsim timeline plan.yaml --compiled -o trace.json
    """
    if implementation and compiled:
        raise PlanError("--as is for plans; what the TPU compiler schedules is what it is")
    check_output(output, as_json, (".json", *PICTURES))
    picture = output.lower().endswith(PICTURES)
    _require("simpy", "networkx", *(("matplotlib",) if picture else ()))
    from shardsim.simulate.collective import Span
    from shardsim.simulate.timeline import save_layer, trace_text

    spans: list[Span] = []
    result = simulated(plan, what_ifs, compiled, implementation, watch=spans.append)
    if picture:
        save_layer(result, spans, output)
        note(f"written to {output}")
    else:
        write_output(output, trace_text(result, spans))
    if as_json:
        emit_json({"path": output, "step_time_s": result.step_time_s, "mfu": result.mfu})
    else:
        told = f"step {result.step_time_s:.4g} s, MFU {100 * result.mfu:.1f} %"
        click.echo(told, err=output == STDOUT)
