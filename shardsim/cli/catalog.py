"""`shardsim hardware` and `shardsim models`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from shardsim.cli.output import answer, json_option, note

if TYPE_CHECKING:
    from shardsim.machine import Chip
    from shardsim.model import Model
    from shardsim.views.table import Table


@click.command()
@click.argument("name", required=False)
@json_option
def hardware(name: str | None, as_json: bool) -> None:
    """List chips; with NAME, show a chip's figures, or a slice.

    \b
    Examples:
      shardsim hardware
      shardsim hardware v4
      shardsim hardware v4-2048
    """
    from shardsim.machine import chip_names, load_chip
    from shardsim.machine.catalog import find_name
    from shardsim.views import catalog as views

    if name is None:
        chips = [load_chip(each) for each in chip_names()]
        answer(as_json, {"chips": [_chip_data(chip) for chip in chips]}, views.chips(chips))
    elif find_name(name) is None and (":" in name or "-" in name or "*" in name):
        _slice(name, as_json)
    else:
        chip = load_chip(name)
        answer(as_json, _chip_data(chip), *_chip_parts(chip))


def _slice(name: str, as_json: bool) -> None:
    """Show a slice: its devices, hosts and torus axes."""
    from shardsim.machine import explain, parse_machine

    machine, told = parse_machine(name), explain(name)
    fields = ("name", "length", "wrapped", "bytes_per_s")
    data = {
        "machine": machine.name,
        "explanation": told,
        "chip": machine.chip.name,
        **{key: getattr(machine, key) for key in ("chips", "devices", "slices", "hosts")},
        "axes": [{key: getattr(axis, key) for key in fields} for axis in machine.axes],
    }
    answer(as_json, data, *([told] if told else []), machine.describe())


def _chip_parts(chip: Chip) -> list[Table | str]:
    """Return a chip with the source of every figure, its slices and its constants."""
    from shardsim.machine import possible_slices
    from shardsim.views import catalog as views

    shapes = possible_slices(chip)
    shown = ", ".join(shapes[:12]) + (f", ... ({len(shapes)} in all)" if len(shapes) > 12 else "")
    parts: list[Table | str] = [
        f"{chip.title} ({chip.name})",
        "",
        views.figures(_figures(chip.figures)),
    ]
    parts.append(f"\nslices: {shown}")
    parts += [f"fitted: {one.name} = {one.value:g}, to {one.fitted_to}" for one in chip.constants]
    if chip.compiler is not None:
        costs = chip.compiler.to_data()
        versions = ", ".join(f"{name} {value}" for name, value in costs["versions"].items())
        parts.append(f"\nop costs, fitted to {costs['fitted_to']} ({versions})\n")
        parts.append(views.constants(costs["constants"]))
    return parts


def _figures(figures: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, figure in figures.items():
        if "value" in figure:
            found.append((prefix + key, figure))
        else:
            found += _figures(figure, f"{prefix}{key}.")
    return found


def _chip_data(chip: Chip) -> dict[str, Any]:
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
    """List models; with NAME, show one with all its weights.

    NAME is a preset, a YAML file or a config.json. With --counts the exit code is 1 if a number is
    not the published one.

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
        answer(as_json, {"counts": rows}, views.counts(rows))
        if not all(row["agrees"] for row in rows):
            raise SystemExit(1)
        return
    if name is None:
        known = {each: load_model(each) for each in model_names()}
        data = {"models": [_model_data(each) for each in known.values()]}
        answer(as_json, data, views.models(known.items()))
        return
    model = read_model(name)
    fields = ("name", "axes", "shape", "stack")
    tensors = [{key: getattr(tensor, key) for key in fields} for tensor in model.tensors]
    lines = [f"{model.name}: {model.parameters:,} parameters ({model.parameter_convention})"]
    if model.parameters != model.parameters_all:
        lines.append(f"every tensor counted: {model.parameters_all:,}")
    if model.experts:
        lines.append(f"active, of a token: {model.active_parameters:,}")
    flops = show_count(model_flops_per_token(model), "FLOP")
    lines.append(f"{flops} per token in training (6N + 12LHQT)")
    lines += [f"  {line}" for line in dump_yaml(model.to_mapping()).splitlines()]
    data = {**_model_data(model), "tensors": tensors}
    answer(as_json, data, *lines, "", views.tensors(model.tensors))


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


def read_model(name: str) -> Model:
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


def _model_data(model: Model) -> dict[str, Any]:
    return {
        **model.to_mapping(),
        "parameters": model.parameters,
        "parameters_all": model.parameters_all,
        "parameters_active": model.active_parameters,
    }
