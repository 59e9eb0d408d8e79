"""`shardsim calibrate`: constants of a chip from measurements or from a compiler."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from shardsim.cli.output import (
    STDOUT,
    FilePath,
    answer,
    check_output,
    emit_json,
    json_option,
    note,
    show,
    write_output,
)
from shardsim.cli.profiling import hlo_option, learn_from_profile
from shardsim.cli.running import need_jax
from shardsim.views.table import Table


@click.command()
@click.argument("plan", metavar="[PLAN.yaml]", required=False)
@click.option(
    "--device",
    type=click.Choice(["cpu", "gpu"]),
    help="Measure this machine's processor, or the GPU that JAX finds.",
)
@click.option(
    "--devices",
    default=8,
    show_default=True,
    type=click.IntRange(2, 64),
    help="Host devices that --device cpu makes of it.",
)
@click.option(
    "--against",
    type=click.Choice(["tpu-compiler"]),
    help="Learn op costs from the TPU compiler; needs no TPU.",
)
@click.option(
    "--chip",
    metavar="NAME",
    help="The chip that the compiler compiles for (v4, v5e, ...), or that a GPU is like.",
)
@click.option(
    "--op",
    "texts",
    multiple=True,
    metavar="NAME:B,M,K,N:DTYPE",
    help="Only show the estimate of this operation; may be repeated.",
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64))
@click.option("--cache", type=FilePath(file_okay=False), help="Keep estimates in this folder.")
@click.option(
    "--points",
    type=FilePath(dir_okay=False, exists=True),
    help="Put the estimates into this file too, as shardsim/validate/data/op_cycles.csv is.",
)
@click.option(
    "--profile",
    type=FilePath(dir_okay=False),
    help="Learn rates from this trace (xplane.pb or trace.json.gz) of a step of PLAN.",
)
@hlo_option
@click.option("-o", "--output", type=FilePath(dir_okay=False), help="Write a hardware file here.")
@json_option
def calibrate(
    plan: str | None,
    device: str | None,
    devices: int,
    against: str | None,
    chip: str | None,
    texts: tuple[str, ...],
    workers: int,
    cache: str | None,
    points: str | None,
    profile: str | None,
    hlo: str | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Make a hardware file from a machine, a compiler or a trace.

    A trace of a plan's real step (--profile) gives the shares of its chip's peaks at which matmuls
    and streams through HBM ran. The compiler is asked for a few hundred operations, which takes
    some minutes; what it said is kept, so that an interrupted run goes on where it stopped.

    \b
    Examples:
      shardsim calibrate --against tpu-compiler --chip v4 -o v4.yaml
      shardsim calibrate --against tpu-compiler --chip v4 --op matmul:1,8,8,8:bf16
      shardsim calibrate --device cpu -o host.yaml
      shardsim calibrate --device gpu -o h100.yaml
      shardsim calibrate plan.yaml --profile host.xplane.pb -o h100.yaml
    """
    from shardsim.errors import ShardsimError
    from shardsim.files import check_writable
    from shardsim.plan import load_plan

    if sum(way is not None for way in (device, against, profile)) != 1:
        raise ShardsimError(
            "calibrate: say one of --device, --against tpu-compiler and --profile FILE"
        )
    if (plan is None) != (profile is None) or (hlo and not profile):
        raise ShardsimError("calibrate: --profile needs a plan; a plan and --hlo go with it alone")
    for key, path in (("-o", output), ("--points", points)):
        if path:
            if texts:
                raise ShardsimError(f"calibrate: {key} needs all operations, not those of --op")
            check_writable(path) if key == "--points" else check_output(path, as_json)
    if profile and plan:
        if chip or texts or points:
            raise ShardsimError("calibrate: --chip, --op and --points do not go with --profile")
        learn_from_profile(load_plan(plan), profile, hlo, output, as_json)
        return
    if against and not chip:
        raise ShardsimError("calibrate: --against tpu-compiler needs --chip, such as v4")
    if device == "gpu" and (texts or points):
        raise ShardsimError("calibrate: --op and --points go with --against tpu-compiler")
    if device == "cpu" and (chip or texts or points):
        raise ShardsimError("calibrate: --chip, --op and --points go with --against tpu-compiler")
    if chip and against and texts:
        _estimates(chip, texts, workers, cache, as_json)
        return
    if chip and against:
        data, text = _from_compiler(chip, workers, cache, points)
    else:
        need_jax("calibrate")
        data, text = _from_gpu(chip) if device == "gpu" else _from_cpu(devices)
        data["text"] = None if output else text
    if as_json:
        emit_json({**data, "path": output})
    elif against:
        show(*_parts(data), err=output == STDOUT)
    elif not output:
        click.echo(text, nl=False)
    if output:
        write_output(output, text, "hardware file")


def _from_cpu(devices: int) -> tuple[dict[str, Any], str]:
    """Measure the processor as so many host devices; return what was done, and a hardware file."""
    from shardsim.xla.calibrate import calibrate_cpu

    return {"device": "cpu", "devices": devices}, calibrate_cpu(devices, progress=note)


def _from_gpu(chip: str | None) -> tuple[dict[str, Any], str]:
    """Measure a GPU, which is like `chip`; return what was found, and a hardware file."""
    from shardsim.xla.calibrate_gpu import calibrate_gpu

    made = calibrate_gpu(chip, progress=note)
    kernels = {} if made.chip.kernels is None else made.chip.kernels.to_data()
    for name, error in made.residuals.items():
        note(f"{name}: estimated {100 * error:+.1f} %")
    of_chip = {"device": "gpu", "chip": made.chip.name}
    return {**of_chip, **kernels, "residuals": dict(made.residuals)}, made.text()


def _estimates(
    name: str, texts: tuple[str, ...], workers: int, cache: str | None, as_json: bool
) -> None:
    """Show what the compiler and the fitted constants say of single operations."""
    from shardsim.machine import load_chip
    from shardsim.validate.op_fit import fitted_cycles
    from shardsim.validate.ops import parse_op
    from shardsim.views import catalog as views
    from shardsim.xla.tpu.op_service import OpCompiler

    chip = load_chip(name)
    ops = [parse_op(text) for text in texts]
    compiler = OpCompiler(chip, folder=Path(cache) if cache else None, workers=workers)
    cycles = compiler.estimate(ops, progress=note)
    fitted = {op: fitted_cycles(chip, op) if chip.compiler else None for op in cycles}
    failed = {op.text: why for op, why in compiler.failed.items()}
    rows = [{"op": op.text, "cycles": cycles[op], "fitted_cycles": fitted[op]} for op in cycles]
    data = {"chip": chip.name, "versions": compiler.versions, "ops": rows, "failed": failed}
    answer(as_json, data, views.estimates(rows))
    for op, why in failed.items():
        note(f"not estimated: {op}: {why}")


def _from_compiler(
    name: str, workers: int, cache: str | None, kept: str | None
) -> tuple[dict[str, Any], str]:
    """Return what was learned of a chip, and its hardware file; add the points to `kept`."""
    from shardsim.files import write_text
    from shardsim.machine import load_chip
    from shardsim.validate.op_file import hardware_text
    from shardsim.validate.op_fit import OWN, Points, points_text, points_with, read_points, refit
    from shardsim.validate.ops import standard_ops
    from shardsim.xla.tpu.op_service import OpCompiler

    chip = load_chip(name)
    folder = Path(cache) if cache else None
    names = [chip.name] if chip.scoped_vmem_bytes is None else [chip.name, chip.name + OWN]
    found = []
    failed: dict[str, str] = {}
    for label in names:
        own = label.endswith(OWN)
        compiler = OpCompiler(chip, folder=folder, workers=workers, own_limit=own)
        points = Points(
            cycles={label: compiler.estimate(standard_ops(), progress=note)},
            versions=compiler.versions,
            dates={label: datetime.now(UTC).date().isoformat()},
        )
        found.append(refit(label, points))
        failed |= {op.text: why for op, why in compiler.failed.items()}
        if kept:
            write_text(kept, points_text(points_with(read_points(Path(kept)), label, points)))
    return {"chip": chip.name, **found[0].to_data(), "failed": failed}, hardware_text(
        chip.name, *found
    )


def _parts(data: dict[str, Any]) -> list[Table | str]:
    from shardsim.views import catalog as views

    versions = ", ".join(f"{name} {value}" for name, value in data["versions"].items())
    return [
        f"{data['chip']}, {data['fitted_to']}, {versions}",
        "",
        views.constants(data["constants"]),
        "",
        views.residuals(data["residuals"]),
        *(f"not estimated: {op}: {why}" for op, why in data["failed"].items()),
    ]
