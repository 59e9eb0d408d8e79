"""Real configurations, imported, planned anew, exported, and read by their trainers' own code.

    python -m shardsim.xla.trainers.configs --maxtext ~/maxtext --big-vision ~/bv \\
        --big-vision-path ~/big_vision --levanter ~/levanter --levanter-path ~/levanter-checkout \\
        --axlearn ~/axlearn --axlearn-path ~/axlearn-checkout -o docs/configs.yaml

Rows of trainers without an environment stay as they were in the file. Nothing of a config is kept
but its name.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from shardsim.cost.predict import Prediction, predict
from shardsim.emit import export_plan
from shardsim.emit.dialects.axlearn import ROLES
from shardsim.errors import ShardsimError
from shardsim.files import read_text, read_yaml, write_text
from shardsim.plan import Plan, resolve
from shardsim.plan.placement import place
from shardsim.plan.plan import MeshAxis
from shardsim.planner.search import search
from shardsim.validate.imports import Imported, import_config
from shardsim.validate.imports.maxtext_given import read_given
from shardsim.validate.over import export_over, maxtext_keys
from shardsim.xla.trainers.process import answered, run, trainer_python, versions

CASES = Path(__file__).with_name("configs.yaml")
_HEADER = "# Written by python -m shardsim.xla.trainers.configs; see docs/trainers.md.\n"
_WORKER = Path(__file__).with_name("reading_worker.py")
_PACKAGES = ("maxtext", "levanter", "haliax", "axlearn", "jax", "flax", "ml_collections", "libtpu")
# What a job says of itself, and that this machine has no TPU.
_MAXTEXT = ("run_name=read", "hardware=cpu", "skip_jax_distributed_system=true")
_TOP = 8
# What a trainer's config can say of remat and microbatches.
_CHOICES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "maxtext": [{"remat": name} for name in ("dots_and_context", "save_qkv", "full")],
    "levanter": [{"remat": "full"}],
    "axlearn": [{"remat": name, "microbatches": 1} for name in ("dots_and_context", "full")],
    "big_vision": [{"remat": name, "microbatches": 1} for name in ("none", "full")],
}
_WHOLE = ("big_vision", "axlearn")  # what is written for them changes a config by itself
# What MaxText makes of a key's value: its words for the same.
_SAME = (("flash", "autoselected"), ("", "float32"))
_REST = -1  # of a parallelism: what is left
Row = dict[str, Any]


def row_of(case: Mapping[str, Any], config: str, python: str, path: Path | None) -> Row:
    """Return what came of one configuration."""
    form = str(case["trainer"])
    found = import_config(config, form, machine=case["slice"])
    before = predict(found.plan, implementation="trainer")
    plan, text = _planned(found, form, config)
    after = predict(plan, implementation="trainer")
    return {
        "date": datetime.date.today().isoformat(),
        "slice": case["slice"],
        "parameters": plan.model.parameters_all,
        "not_carried": len(found.not_carried),
        "could_change": sorted(item.key for item in found.not_carried if item.could_change),
        "imported": _step(found.plan, before),
        "planned": _step(plan, after),
        "changed": _changes(config, text) if form == "maxtext" else [],
        "read": _read(form, plan, text, config, python, path),
    }


def _changes(config: str, text: str) -> list[str]:
    """Return which keys of a script the exported one has otherwise."""
    before, after = (
        read_given(Path(config), one).values for one in (read_text(Path(config)), text)
    )
    return sorted(key for key in after if before.get(key) != after[key])


def _step(plan: Plan, prediction: Prediction) -> Row:
    return {
        "step_time_s": float(f"{prediction.step_time_s:.4g}"),
        "mfu": float(f"{prediction.mfu:.4g}"),
        "fits": bool(prediction.fits),
        "mesh": {axis.name: axis.size for axis in plan.mesh},
        "remat": plan.remat.name,
        "microbatches": plan.microbatches,
    }


def _planned(found: Imported, form: str, config: str) -> tuple[Plan, str]:
    """Return the best plan that the trainer's config can say, and the text that says it."""
    own = found.plan
    found_plans = [
        one.plan
        for fix in _CHOICES[form]
        for one in search(
            own.model,
            own.machine,
            own.batch,
            sequence=own.sequence,
            top=_TOP,
            optimizer=own.optimizer,
            attention=own.attention.removesuffix("-2023"),
            precision=own.precision,
            fix=fix,
        ).predictions
    ]
    if not found_plans:
        raise ShardsimError(f"no plan that {form} can say fits {own.machine.name}")
    # Where a trainer lays the same axes out otherwise, as it would.
    found_plans += [replace(one, mesh=_laid_by_jax(one)) for one in found_plans]
    problems: list[str] = []
    best: tuple[float, Plan, str] | None = None
    for one in found_plans:
        plan = replace(
            own,
            mesh=one.mesh,
            parameters=one.parameters,
            activations=one.activations,
            microbatches=one.microbatches,
            remat=one.remat,
        )
        try:
            priced = predict(plan, implementation="trainer")
            if not priced.fits or (best and priced.step_time_s >= best[0]):
                continue
            text = export_plan(plan, form) if form in _WHOLE else export_over(plan, form, config)
            best = (priced.step_time_s, plan, text)
        except ShardsimError as error:
            problems.append(str(error))
    if best is None:
        raise ShardsimError(f"none of {len(problems)} plans can be exported: {problems[:1]}")
    return best[1], best[2]


def _laid_by_jax(plan: Plan) -> tuple[MeshAxis, ...]:
    """Return the mesh of a plan on the torus axes that JAX's device mesh gives it."""
    if plan.machine.slices > 1:
        return plan.mesh
    return place({axis.name: axis.size for axis in plan.mesh}, plan.machine)


def _read(form: str, plan: Plan, text: str, config: str, python: str, path: Path | None) -> Row:
    """Return what the trainer's own code reads in the text, beside what the plan says."""
    with tempfile.TemporaryDirectory() as folder:
        request, wanted = _request(form, plan, text, config, Path(folder))
        file = Path(folder) / "request.json"
        file.write_text(json.dumps({"trainer": form, **request}), encoding="utf-8")
        command = [trainer_python(python), "-P", str(_WORKER), str(file)]
        places = [str(path)] if path and form in _WHOLE else []
        devices = plan.machine.devices if form == "big_vision" else 1
        more = {"JAX_PLATFORMS": "cpu"}
        code, said = run(command, folder, devices=devices, more=more, path=places)
        answer = answered(form, code, said)
        versioned = versions(command[0], _PACKAGES, folder)
    differ = {
        key: [value, answer.get(key)]
        for key, value in wanted.items()
        if answer.get(key) not in (value, _REST if "parallelism" in key else value)
        and (value, answer.get(key)) not in _SAME
    }
    row: Row = {"ok": not differ, "versions": versioned, "as_planned": len(wanted) - len(differ)}
    if differ:
        row["differ"] = differ
    return row


def _request(
    form: str, plan: Plan, text: str, config: str, folder: Path
) -> tuple[Row, Mapping[str, Any]]:
    """Return what to ask a trainer's code, and the answer that the plan gives."""
    name, _, arguments = config.partition(".py:")
    file = folder / ("exported" + (".py" if form in _WHOLE else Path(config).suffix))
    file.write_text(text, encoding="utf-8")
    if form == "big_vision":
        model = plan.model
        row = model.embed if model.pooling == "cls" else 0  # a class token has no position there
        wanted: dict[str, Any] = {
            "parameters": model.parameters_all - row,
            "batch": plan.batch,
            "mesh": {axis.name: axis.size for axis in plan.mesh},
        }
        source = f"{name}.py" if arguments else config
        asked = {"config": source, "arguments": arguments, "image": plan.model.image}
        return {**asked, "file": str(file)}, wanted
    if form == "axlearn":
        sizes = {axis.name: axis.size for axis in plan.mesh if axis.size > 1}
        roles = {name: role for role, names in resolve(plan).names.items() for name in names}
        wanted = {
            "parameters": plan.model.parameters_all,
            "mesh": {ROLES[roles[name]]: size for name, size in sizes.items()},
            "lie_otherwise": [],
        }
        return {"config": config, "file": str(file)}, wanted
    if form == "levanter":
        keys = ("train_batch_size", "per_device_parallelism", "model_axis_size")
        section = yaml.safe_load(text)
        wanted = {key: section["trainer"][key] for key in keys if key in section["trainer"]}
        kept = {"gradient_checkpointing": section["model"].get("gradient_checkpointing", True)}
        return {"file": str(file), "keys": list(wanted)}, {**wanted, **kept}
    given = read_given(file, text)
    wanted = maxtext_keys(plan)
    words = [f"{key}={json.dumps(value)}" for key, value in given.values.items()]
    base = Path(config).parents[2] / "base.yml"
    return {"words": [str(base), *words, *_MAXTEXT], "keys": list(wanted)}, wanted


def main() -> None:
    """Go through the configurations whose trainers are given."""
    parser = argparse.ArgumentParser(description="Real configs in the trainers themselves.")
    for trainer in ("maxtext", "big-vision", "levanter", "axlearn"):
        parser.add_argument(f"--{trainer}", metavar="ENVIRONMENT")
    parser.add_argument("--big-vision-path", type=Path, metavar="CHECKOUT")
    parser.add_argument("--levanter-path", type=Path, metavar="CHECKOUT")
    parser.add_argument("--axlearn-path", type=Path, metavar="CHECKOUT")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    results: dict[str, Any] = read_yaml(options.output) if options.output.is_file() else {}
    for case in read_yaml(CASES):
        form, key = case["trainer"], f"{case['config']} of {case['trainer']}"
        python = getattr(options, form)
        if python is None or options.only not in key:
            continue
        path = getattr(options, f"{form}_path", None)
        if form == "maxtext":
            root = Path(trainer_python(python)).parents[1]
            path = next(root.glob("lib/python*/site-packages/maxtext"), None)
        config = case["config"] if form == "axlearn" else str(path / case["config"])
        try:
            results[key] = row_of(case, config, python, path)
        except ShardsimError as error:
            results[key] = {"slice": case["slice"], "error": str(error).replace(str(path), "")}
        read = results[key].get("read", {"ok": False})
        print(f"{key}: read {read['ok']}", file=sys.stderr)
        write_text(options.output, _HEADER + yaml.safe_dump(results, sort_keys=False, width=96))


if __name__ == "__main__":
    main()
