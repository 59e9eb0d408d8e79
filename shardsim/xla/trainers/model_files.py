"""MaxText's own model files: which are read, and their weights beside those that MaxText makes.

    python -m shardsim.xla.trainers.model_files --maxtext ~/maxtext -o docs/maxtext_models.yaml

Each file of the package is imported with the package's base.yml, and its weights are counted by
MaxText's own code without making them. Nothing of a file is kept but its name.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from shardsim.emit.dialects.nearest import differences
from shardsim.errors import ModelError, ShardsimError, shown
from shardsim.files import write_text
from shardsim.model import load_model, published_count
from shardsim.validate.imports import Imported, import_config
from shardsim.xla.trainers.process import answered, run, trainer_python, versions

_HEADER = "# Written by python -m shardsim.xla.trainers.model_files; see docs/imports.md.\n"
_WORKER = Path(__file__).with_name("model_files_worker.py")
# Where a model is imported to: the first slice whose devices its sizes divide by.
SLICES = ("v5p:8x8x8", "v5p:4x4x4", "v5p:2x2x2")
# Ends of names of one model's files: trained on, laid out or stored otherwise.
_VARIANTS = ("-base", "-pt", "-thinking-2507", "-2dfsdp", "-batchsplit")
Row = dict[str, Any]


def row_of(file: Path, own: int | str) -> Row:
    """Return what became of one file; `own` is MaxText's count, or why it makes no model."""
    base = file.parents[1] / "base.yml"
    counted: Row = {"own": own} if isinstance(own, int) else {"own_error": own}
    refused = ""
    for machine in SLICES:
        try:
            found = import_config(str(file), "maxtext", machine=machine, base=base)
        except ShardsimError as error:
            refused = str(error).removeprefix(f"{file}: ")
            if "does not divide" not in refused:
                break
            continue
        model = found.plan.model
        biases = sum(tensor.size for tensor in model.tensors if tensor.name == "router_bias")
        if biases and model.parameters_all - biases == own:
            counted["apart"] = f"{biases} biases of routers, which MaxText keeps beside its weights"
        elif any(item.key == "weight_block_size" for item in found.not_carried):
            counted["apart"] = "scales of blocks of 8 bits, which MaxText counts"
        elif model.branch and model.parameters_all + model.layers * model.embed == own:
            counted["apart"] = "a norm of each layer that nothing reads, which MaxText counts"
        return {**_read(found, file.stem), "slice": machine, **counted}
    return {"refused": refused, **counted}


def _read(found: Imported, name: str) -> Row:
    model = found.plan.model
    row: Row = {"parameters": model.parameters_all}
    row["could_change"] = sorted(item.key for item in found.not_carried if item.could_change)
    for end in _VARIANTS:
        name = name.removesuffix(end)
    try:
        published = published_count(name)
    except ModelError:
        return row
    row["published"] = published.parameters
    if not published.agrees(model.parameters_all):
        row["other_sizes"] = list(differences(load_model(name), model))
    return row


def counts(names: Sequence[str], python: str) -> Mapping[str, int | str]:
    """Return MaxText's own number of weights of each model, or why its code makes none."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps({"names": list(names)}), encoding="utf-8")
        command = [trainer_python(python), "-P", str(_WORKER), str(file)]
        code, said = run(command, folder, more={"JAX_PLATFORMS": "cpu"})
    return answered("maxtext", code, said)


def results(python: str, only: str = "") -> Row:
    """Return all rows, with the date and the versions of MaxText's environment."""
    root = Path(trainer_python(python)).parents[1]
    folder = next(root.glob("lib/python*/site-packages/maxtext/configs/models"), None)
    if folder is None:
        raise ShardsimError(f"--maxtext: {shown(python)} has no maxtext; pip install maxtext")
    files = sorted(file for file in folder.glob("*.yml") if only in file.stem)
    own = counts([file.stem for file in files], python)
    rows = {file.stem: row_of(file, own[file.stem]) for file in files}
    refused = [row["refused"] for row in rows.values() if "refused" in row]
    read = [row for row in rows.values() if "parameters" in row]
    return {
        "date": datetime.date.today().isoformat(),
        "versions": versions(trainer_python(python), ("maxtext", "jax", "flax"), str(root)),
        "files": len(rows),
        "read": len(read),
        "refused": len(refused),
        "as_maxtext_counts": sum(row["parameters"] == row.get("own") for row in read),
        "apart_for_a_reason": sum("apart" in row for row in read),
        "models": rows,
    }


def main() -> None:
    """Go through all files of an installed MaxText."""
    parser = argparse.ArgumentParser(description="MaxText's own model files.")
    parser.add_argument("--maxtext", required=True, metavar="ENVIRONMENT")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    try:
        found = results(options.maxtext, options.only)
    except ShardsimError as error:
        sys.exit(f"error: {error}")
    write_text(options.output, _HEADER + yaml.safe_dump(found, sort_keys=False, width=96))
    summary = ("files", "read", "refused", "as_maxtext_counts", "apart_for_a_reason")
    print({key: found[key] for key in summary}, file=sys.stderr)


if __name__ == "__main__":
    main()
