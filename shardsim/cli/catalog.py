"""`shardsim hardware` and `shardsim models`."""

from __future__ import annotations

from typing import Any

import click

from shardsim.cli.output import command_errors, emit_json, json_option, table


@click.command()
@click.argument("name", required=False)
@json_option
@command_errors
def hardware(name: str | None, as_json: bool) -> None:
    """List chips; with NAME, one chip with the source of every figure, or one slice.

    \b
    Examples:
      shardsim hardware
      shardsim hardware v4
      shardsim hardware v4-2048
    """
    from shardsim.machine import chip_names, explain, load_chip, parse_machine, possible_slices
    from shardsim.machine.catalog import find_name
    from shardsim.units import show_bytes, show_count

    if name is None:
        chips = [load_chip(each) for each in chip_names()]
        if as_json:
            emit_json({"chips": [_chip_data(chip) for chip in chips]})
            return
        rows = [
            [
                chip.name,
                chip.title,
                show_count(chip.peak("bf16"), "FLOP/s"),
                show_bytes(chip.hbm_usable_bytes),
                show_count(chip.hbm_bytes_per_s, "B/s"),
                show_count(chip.link_bytes_per_s, "B/s"),
                f"{chip.torus_dims}-D torus" if chip.interconnect == "torus" else "switch",
            ]
            for chip in chips
        ]
        headers = ["chip", "", "bf16 peak", "usable HBM", "HBM", "link, one way", "links"]
        click.echo(table(headers, rows))
        return
    if find_name(name) is None and (":" in name or "-" in name or "*" in name):
        machine = parse_machine(name)
        axes = [
            {
                "name": axis.name,
                "length": axis.length,
                "wrapped": axis.wrapped,
                "bytes_per_s": axis.bytes_per_s,
            }
            for axis in machine.axes
        ]
        if as_json:
            emit_json(
                {
                    "machine": machine.name,
                    "explanation": explain(name),
                    "chip": machine.chip.name,
                    "chips": machine.chips,
                    "devices": machine.devices,
                    "slices": machine.slices,
                    "hosts": machine.hosts,
                    "axes": axes,
                }
            )
            return
        if told := explain(name):
            click.echo(told)
        click.echo(machine.describe())
        return
    chip = load_chip(name)
    if as_json:
        emit_json(_chip_data(chip))
        return
    click.echo(f"{chip.title} ({chip.name})\n")
    rows = [
        [key, _show(figure.get("value")), figure.get("status", ""), figure.get("source", "")]
        for key, figure in _figures(chip.figures)
    ]
    click.echo(table(["figure", "value", "status", "source"], rows))
    shapes = possible_slices(chip)
    shown = ", ".join(shapes[:12]) + (f", ... ({len(shapes)} in all)" if len(shapes) > 12 else "")
    click.echo(f"\nslices: {shown}")
    for constant in chip.constants:
        click.echo(f"fitted: {constant.name} = {constant.value:g}, to {constant.fitted_to}")
    if chip.compiler is not None:
        costs = chip.compiler.to_data()
        rows = [[name, f"{value:g}"] for name, value in costs["constants"].items()]
        versions = ", ".join(f"{name} {value}" for name, value in costs["versions"].items())
        click.echo(f"\nop costs, fitted to {costs['fitted_to']} ({versions})\n")
        click.echo(table(["constant", "value"], rows))


def _figures(figures: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, figure in figures.items():
        if "value" in figure:
            found.append((prefix + key, figure))
        else:
            found += _figures(figure, f"{prefix}{key}.")
    return found


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _chip_data(chip: Any) -> dict[str, Any]:
    return {
        "name": chip.name,
        "title": chip.title,
        "kind": chip.kind,
        "aliases": list(chip.aliases),
        "peak_bf16_flops": chip.peak("bf16"),
        "hbm_usable_bytes": chip.hbm_usable_bytes,
        "hbm_bytes_per_s": chip.hbm_bytes_per_s,
        "link_bytes_per_s": chip.link_bytes_per_s,
        "devices_per_chip": chip.devices_per_chip,
        "compiler": chip.compiler.to_data() if chip.compiler else None,
        "figures": {key: dict(figure) for key, figure in _figures(chip.figures)},
        "constants": [
            {"name": item.name, "value": item.value, "fitted_to": item.fitted_to}
            for item in chip.constants
        ],
    }


@click.command()
@click.argument("name", required=False)
@json_option
@command_errors
def models(name: str | None, as_json: bool) -> None:
    """List models; with NAME (a preset or a YAML file), one with all its weights.

    \b
    Examples:
      shardsim models
      shardsim models vit-22b
    """
    from shardsim.cli.show import model_rows
    from shardsim.model import load_model, model_flops_per_token, model_names, parameters
    from shardsim.units import show_count

    if name is None:
        if as_json:
            emit_json({"models": [_model_data(load_model(each)) for each in model_names()]})
        else:
            click.echo(model_rows(model_names(), load_model))
        return
    model = read_model(name)
    if as_json:
        tensors = [
            {
                "name": tensor.name,
                "axes": list(tensor.axes),
                "shape": list(tensor.shape),
                "stack": tensor.stack,
            }
            for tensor in parameters(model)
        ]
        emit_json({**_model_data(model), "tensors": tensors})
        return
    click.echo(f"{model.name}: {model.parameters:,} parameters ({model.parameter_convention})")
    if model.parameters != model.parameters_all:
        click.echo(f"every tensor counted: {model.parameters_all:,}")
    click.echo(
        f"{show_count(model_flops_per_token(model), 'FLOP')} per token in training (6N + 12LHQT)"
    )
    for key, value in model.to_mapping().items():
        click.echo(f"  {key}: {value}")
    rows = [
        [tensor.name, " x ".join(tensor.axes), " x ".join(map(str, tensor.shape)), tensor.stack]
        for tensor in parameters(model)
    ]
    click.echo("\n" + table(["weight", "axes", "shape", "copies"], rows))


def read_model(name: str) -> Any:
    """Return the model that a preset's name or a file's path names."""
    import os

    from shardsim.model import load_model, load_model_file

    if name.endswith((".yaml", ".yml")) or os.path.isfile(name):
        return load_model_file(name)
    return load_model(name)


def _model_data(model: Any) -> dict[str, Any]:
    return {
        **model.to_mapping(),
        "parameters": model.parameters,
        "parameters_all": model.parameters_all,
    }
