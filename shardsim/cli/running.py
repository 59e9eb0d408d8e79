"""`shardsim export` and `shardsim verify`: the plan as code, and the code run for real."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardsim.cli.compiling import compiler, evidence_parts, tell_unused
from shardsim.cli.options import compiler_options, plan_argument
from shardsim.cli.output import (
    JSON,
    PYTHON,
    STDOUT,
    YAML,
    FilePath,
    answer,
    check_output,
    emit_json,
    json_option,
    note,
    write_output,
)
from shardsim.cli.profiling import compare_profile, hlo_option
from shardsim.views.table import Table

if TYPE_CHECKING:
    from shardsim.plan import Plan


@click.command()
@click.option(
    "--to",
    "form",
    default="jax",
    show_default=True,
    help="jax: a train step to run or import; specs: mesh, specs by path, constraints and remat, "
    "to import; json, yaml: plain data; flax, flax-linen, maxtext, "
    "big_vision, keras, axlearn, levanter: for that trainer.",
)
@click.option(
    "--trainer-path",
    type=FilePath(path_type=Path),
    help="maxtext: the installed MaxText whose words to use (checkout, package or environment).",
)
@click.option(
    "--over",
    metavar="CONFIG",
    help="maxtext, levanter: your config (or script), with what the plan changes of it alone.",
)
@plan_argument
@click.option("-o", "--output", type=FilePath(dir_okay=False), help="Write here; - is stdout.")
@json_option
def export(
    plan: Plan,
    form: str,
    trainer_path: Path | None,
    over: str | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Write a plan as JAX code, for another trainer, or as data.

    What a trainer cannot hold is refused, with the reason; MaxText and big_vision take the nearest
    that they can, and what differs is said.

    \b
    Examples:
      shardsim export vit-22b-published-tp8 --to jax -o train.py
      shardsim export maxtext-32b-published-v5p-1x64 --to maxtext -o plan.yml
      shardsim export plan.yaml --to maxtext --over run.sh -o planned.sh
    """
    from shardsim.emit import export_plan
    from shardsim.emit.dialects.nearest import told_in
    from shardsim.validate.round_trip import left_out

    written = {"json": JSON, **dict.fromkeys(("yaml", "maxtext", "levanter"), YAML)}
    check_output(output, as_json, text=written.get(form, PYTHON))
    if over is not None:
        from shardsim.validate.over import export_over

        text = export_over(plan, form, over)
    else:
        text = export_plan(plan, form, trainer_path)
    if output or not as_json:
        write_output(output or STDOUT, text)
        for line in told_in(text):
            note(line)
    left = left_out(plan, text, form, over or "")
    for item in left:
        note(str(item))
    if as_json:
        emit_json(
            {
                "to": form,
                "path": output,
                "text": None if output else text,
                "not_carried": [item.to_data() for item in left],
            }
        )


@click.command()
@click.option(
    "--against",
    default="host",
    show_default=True,
    type=click.Choice(
        ["host", "device", "tpu", "maxtext", "big_vision", "flax", "keras", "axlearn", "levanter"]
    ),
    help="host: run on this machine's processor, as several devices; device: run where JAX finds "
    "devices, a GPU say; tpu: compile for the "
    "plan's slice with the real TPU compiler, without a TPU; or a trainer, with the exported "
    "file in its own code.",
)
@click.option("--trainer-python", help="The Python of the trainer's own environment.")
@click.option(
    "--trainer-path",
    type=FilePath(path_type=Path),
    help="The trainer's source, where it is no package (big_vision).",
)
@click.option("--devices", default=8, show_default=True, type=click.IntRange(1, 64))
@click.option(
    "--scale",
    default="tiny",
    show_default=True,
    type=click.Choice(["tiny", "full"]),
    help="tiny: model and mesh shrunk, every axis and technique kept; with a trainer, full "
    "compiles for the plan's slice.",
)
@click.option(
    "--measure",
    is_flag=True,
    help="Also time it, and against host devices plans of a small ViT too.",
)
@click.option(
    "--results",
    type=FilePath(dir_okay=False),
    help="With --against device --measure: add what was measured to this file, which "
    "`validate --measured` reads.",
)
@click.option(
    "--machine-file",
    type=FilePath(dir_okay=False),
    help="With --measure: what `shardsim calibrate` wrote; without it this machine is measured.",
)
@click.option(
    "--profile",
    type=FilePath(dir_okay=False),
    help="Run nothing: read this trace (xplane.pb or trace.json.gz) of the plan's step.",
)
@hlo_option
@plan_argument
@compiler_options
@json_option
def verify(
    plan: Plan,
    against: str,
    trainer_python: str | None,
    trainer_path: Path | None,
    devices: int,
    scale: str,
    measure: bool,
    results: str | None,
    machine_file: str | None,
    profile: str | None,
    hlo: str | None,
    service: dict[str, Any],
    as_json: bool,
) -> None:
    """Run or compile a plan for real, and compare.

    Against the host, loss, gradients and updated parameters are compared with those of the
    unsharded model, and the collectives of the compiled program with the planned ones (needs
    `pip install shardsim[jax]`). Against the TPU compiler, HBM, FLOPs, time and every collective
    are compared, and what was not planned is priced and traced to its line of the emitted program
    (needs `pip install shardsim[tpu]`). Exit status 1 if it is not as planned, or does not fit.

    With --profile a trace of a real step, of TPUs, GPUs or host devices, is laid beside the
    prediction: where measured and predicted differ, most first.

    \b
    Examples:
      shardsim verify vit-22b-published-tp8 --against host
      shardsim verify vit-22b-published-tp8 --against tpu
      shardsim verify plan.yaml --measure --machine-file host.yaml
      shardsim verify plan.yaml --against maxtext --trainer-python ~/maxtext
      shardsim verify plan.yaml --profile plugins/profile/run/host.xplane.pb
    """
    from shardsim.errors import PlanError

    if hlo and profile is None:
        raise PlanError("verify: --hlo is only for --profile")
    if profile is not None or against != "tpu":
        tell_unused("no TPU compiler is asked", "workers", "scheduler", "timeout", "no_cache")
    if profile is not None:
        if measure or machine_file or against != "host":
            raise PlanError(
                "verify: --profile runs nothing: no --against, --measure, --machine-file"
            )
        compare_profile(plan, profile, hlo, as_json)
        return
    if against == "tpu":
        from shardsim.xla.tpu.evidence import verify_tpu

        with compiler(**service) as tpu:
            found = verify_tpu(plan, tpu)
        answer(as_json, found, *evidence_parts(found))
        sys.exit(0 if found["ok"] else 1)
    if against == "device":
        _on_device(plan, measure, scale, results, as_json)
        return
    if results:
        raise PlanError("verify: --results is for --against device")
    if against != "host":
        from shardsim.cli.trainers import verify_against

        verify_against(plan, against, trainer_python, trainer_path, scale, devices, as_json)
    if machine_file and not measure:
        raise PlanError("verify: --machine-file is only for --measure")
    need_jax("verify")
    from shardsim.xla import verify_host
    from shardsim.xla.measure import measured_result

    result = verify_host(plan, devices=devices, scale=scale, progress=note)
    if measure:
        result = measured_result(result, plan, devices, scale, machine_file, note)
    answer(as_json, result, *_parts(result))
    sys.exit(0 if result["ok"] else 1)


def _on_device(plan: Plan, measure: bool, scale: str, results: str | None, as_json: bool) -> None:
    """Run a plan where JAX finds devices, and show what came out."""
    from shardsim.errors import PlanError
    from shardsim.files import check_writable
    from shardsim.xla.device import verify_device

    need_jax("verify")
    if results:
        if not measure:
            raise PlanError("verify: --results needs --measure")
        check_writable(results)
    found = verify_device(plan, measure=measure, scale=scale, results=results, progress=note)
    answer(as_json, found, *_device_parts(found))
    sys.exit(0 if found["ok"] else 1)


def _device_parts(found: dict[str, Any]) -> list[Table | str]:
    from shardsim.units import show_bytes, show_percent, show_time

    device = found["device"]
    parts: list[Table | str] = [
        "verified" if found["ok"] else "NOT VERIFIED",
        f"on {device['count']} x {device['kind']}",
        _errors(found),
    ]
    if "measured" not in found:
        return parts
    step, measured = found["step"], found["measured"]
    error = step["predicted_s"] / step["measured_s"] - 1.0
    parts += [
        "",
        f"step time: {show_time(step['measured_s'])} measured ({measured['steps']} steps, spread "
        f"{show_percent(measured['spread'])}), {show_time(step['predicted_s'])} predicted "
        f"({100 * error:+.1f} %)",
    ]
    if measured["peak_bytes"] is not None:
        error = measured["predicted_peak_bytes"] / measured["peak_bytes"] - 1.0
        parts.append(
            f"memory: {show_bytes(measured['peak_bytes'])} measured, "
            f"{show_bytes(measured['predicted_peak_bytes'])} predicted ({100 * error:+.1f} %)"
        )
    if found["measured_on"] != found["predicted_for"]:
        parts.append(
            f"the prediction is for {found['predicted_for']}, which {found['measured_on']} is not"
        )
    return parts


def need_jax(command: str) -> None:
    from shardsim.errors import ShardsimError

    if find_spec("jax") is None or find_spec("optax") is None:
        raise ShardsimError(f"{command} needs JAX and optax: pip install 'shardsim[jax]'")


def _parts(result: dict[str, Any]) -> list[Table | str]:
    from shardsim.views.evidence import collectives, timed

    verdict = "verified" if result["ok"] else "NOT VERIFIED"
    found: list[Table | str] = [verdict, _errors(result), ""]
    found += collectives(result["collectives"], exact=True)
    for use in result["unplanned"]:
        found.append(
            f"unplanned: {use['kind']} over {', '.join(use['mesh_axes']) or '-'}, "
            f"{use['bytes']:,.0f} bytes, from {use['source']}"
        )
    if "measured" not in result:
        return found
    measured, step = result["measured"], result["step"]
    return [
        *found,
        "",
        f"this plan's step: {step['predicted_s']:.4f} s predicted, {step['measured_s']:.4f} s "
        "measured",
        "",
        timed(measured["rows"]),
        f"rank correlation {measured['rank_correlation']:.2f}, "
        f"median error {100 * measured['median_abs_error']:.0f} %",
    ]


def _errors(result: dict[str, Any]) -> str:
    """Return how far the numbers are off; roundings differ from processor to processor."""
    if max(result["loss_rel_error"], result["grad_rel_error"]) <= 1e-5:
        return "loss and gradients are those of the unsharded model, to 1e-5 or better"
    return (
        f"relative error of the loss {result['loss_rel_error']:.1e}, "
        f"of the gradients {result['grad_rel_error']:.1e}"
    )
