"""Gives every plan of `cases.yaml` to its trainers and writes down what they made of it.

    python -m shardsim.xla.trainers --maxtext ~/maxtext --flax ~/flax --keras ~/flax \\
        --big-vision ~/bv --big-vision-path ~/big_vision -o docs/trainers.yaml

Runs without an environment, and those that `--only` leaves out, stay as they were in the file. A
full compile takes one to ten minutes of two free cores and about 3 GB.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from shardsim.errors import ShardsimError
from shardsim.files import read_yaml, write_text
from shardsim.plan import Plan, load_plan, plan_from_data
from shardsim.xla.trainers import verify_trainer

CASES = Path(__file__).with_name("cases.yaml")
_HEADER = "# Written by python -m shardsim.xla.trainers; see docs/trainers.md.\n"


def summary(result: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return what is kept of a result: counts instead of every parameter."""
    placed = result["parameters"]
    kept: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds),
        "ok": result["ok"],
        "versions": result["versions"],
        "arrays": len(placed),
        "as_exported": len(placed) - len(result["not_as_exported"]),
        "as_planned": sum(row["same"] for row in placed),
    }
    for key in ("state", "temporaries"):
        if result[key]["compiled_bytes"] is not None:
            kept[key] = result[key]
    if result["losses"]:
        kept["losses"] = result["losses"]
    for key in ("collectives", "differences", "remarks"):
        if result[key]:
            kept[key] = result[key]
    return kept


def case_plan(case: dict[str, Any]) -> Plan:
    """Return the plan of a case."""
    plan = case["plan"]
    if isinstance(plan, str):
        return load_plan(plan)
    return plan_from_data(plan, f"{CASES.name}: {case['name']}")


def main() -> None:
    """Run what the given environments can run."""
    parser = argparse.ArgumentParser(description="Exported plans in the trainers themselves.")
    for trainer in ("maxtext", "flax", "keras", "axlearn", "levanter", "big-vision"):
        parser.add_argument(f"--{trainer}", metavar="ENVIRONMENT")
    parser.add_argument("--big-vision-path", type=Path, metavar="CHECKOUT")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="runs whose key in the file has TEXT in it"
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    results: dict[str, Any] = read_yaml(options.output) if options.output.is_file() else {}
    for case in read_yaml(CASES):
        for against, scale in case["runs"]:
            python = getattr(options, against)
            key = f"{case['name']} in {against}, {scale}"
            if python is None or options.only not in key:
                continue
            path = options.big_vision_path if against == "big_vision" else None
            began = time.monotonic()
            try:
                found = verify_trainer(
                    case_plan(case), against, python=python, path=path, scale=scale
                ).to_data()
                row = summary(found, time.monotonic() - began)
            except ShardsimError as error:
                row = {"ok": False, "error": str(error)}
            results[key] = row
            print(f"{key}: ok {row['ok']}", file=sys.stderr)
            text = yaml.safe_dump(results, sort_keys=False, width=96)
            write_text(options.output, _HEADER + text)


if __name__ == "__main__":
    main()
