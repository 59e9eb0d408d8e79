"""`shardsim hardware` and `shardsim models`."""

from __future__ import annotations

from typing import Any

import click

from shardsim.cli.output import emit_json, json_option, note, show


@click.command()
@click.argument("name", required=False)
@json_option
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
    from shardsim.views import catalog as views

    if name is None:
        chips = [load_chip(each) for each in chip_names()]
        if as_json:
            emit_json({"chips": [_chip_data(chip) for chip in chips]})
            return
        show(views.chips(chips))
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
    shapes = possible_slices(chip)
    shown = ", ".join(shapes[:12]) + (f", ... ({len(shapes)} in all)" if len(shapes) > 12 else "")
    show(
        f"{chip.title} ({chip.name})",
        "",
        views.figures(_figures(chip.figures)),
        f"\nslices: {shown}",
        *(
            f"fitted: {constant.name} = {constant.value:g}, to {constant.fitted_to}"
            for constant in chip.constants
        ),
    )
    if chip.compiler is not None:
        costs = chip.compiler.to_data()
        versions = ", ".join(f"{name} {value}" for name, value in costs["versions"].items())
        told = f"\nop costs, fitted to {costs['fitted_to']} ({versions})\n"
        show(told, views.constants(costs["constants"]))


def _figures(figures: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, figure in figures.items():
        if "value" in figure:
            found.append((prefix + key, figure))
        else:
            found += _figures(figure, f"{prefix}{key}.")
    return found


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
@click.option("--counts", is_flag=True, help="Print parameters beside the published number.")
@json_option
def models(name: str | None, counts: bool, as_json: bool) -> None:
    """List models; with NAME (a preset, a YAML file, a config.json), one with all its weights.

    With --counts the exit code is 1 if a number is not the published one.

    \b
    Examples:
      shardsim models
      shardsim models vit-22b
      shardsim models --counts
    """
    from shardsim.model import load_model, model_flops_per_token, model_names
    from shardsim.plan.io import dump_yaml
    from shardsim.units import show_count
    from shardsim.views import catalog as views

    if counts:
        rows = [_count(each) for each in ([name] if name else model_names())]
        if as_json:
            emit_json({"counts": rows})
        else:
            show(views.counts(rows))
        if not all(row["agrees"] for row in rows):
            raise SystemExit(1)
        return
    if name is None:
        if as_json:
            emit_json({"models": [_model_data(load_model(each)) for each in model_names()]})
        else:
            show(views.models((each, load_model(each)) for each in model_names()))
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
            for tensor in model.tensors
        ]
        emit_json({**_model_data(model), "tensors": tensors})
        return
    click.echo(f"{model.name}: {model.parameters:,} parameters ({model.parameter_convention})")
    if model.parameters != model.parameters_all:
        click.echo(f"every tensor counted: {model.parameters_all:,}")
    if model.experts:
        click.echo(f"active, of a token: {model.active_parameters:,}")
    click.echo(
        f"{show_count(model_flops_per_token(model), 'FLOP')} per token in training (6N + 12LHQT)"
    )
    lines = dump_yaml(model.to_mapping()).splitlines()
    show(*(f"  {line}" for line in lines), "", views.tensors(model.tensors))


def _count(name: str) -> dict[str, Any]:
    """Return the parameters of a preset beside the published ones."""
    from shardsim.model import load_model, published_count

    model, known = load_model(name), published_count(name)
    return {
        "name": name,
        "parameters": model.parameters,
        "published": known.parameters,
        "less": known.less,
        "why": known.why,
        "within": known.within,
        "difference": model.parameters - known.expected,
        "agrees": known.agrees(model.parameters),
        "source": model.source,
    }


def read_model(name: str) -> Any:
    """Return the model of a preset's name or a file's path: YAML, or a Hugging Face config.

    Keys of a config that are not carried and could change a step are named in a note, and so are
    sizes that it leaves to defaults.
    """
    from shardsim.model import load_hf, load_model
    from shardsim.model.hf import config_path

    if config_path(name):
        found = load_hf(name)
        if left := [item.key for item in found.not_carried if item.could_change]:
            note(f"{name}: not carried: {', '.join(left)}; why: shardsim import --from hf")
        if found.assumed:
            note(f"{name}: {found.assumed}")
        return found.model
    return load_model(name)


def _model_data(model: Any) -> dict[str, Any]:
    return {
        **model.to_mapping(),
        "parameters": model.parameters,
        "parameters_all": model.parameters_all,
        "parameters_active": model.active_parameters,
    }
