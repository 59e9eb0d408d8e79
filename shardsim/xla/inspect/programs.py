"""Programs that the reader of `shardsim inspect` has read, as a list with what came out.

    python -m shardsim.xla.inspect.programs -o docs/programs.yaml

Steps of plans in `programs.yaml` are compiled for their slices without a TPU and read; those of
`shardsim evidence` are in the list as they were read then. It goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from shardsim.errors import ShardsimError
from shardsim.files import read_yaml, write_text
from shardsim.plan import Plan, plan_from_data, resolve
from shardsim.xla.inspect.inspected import inspect_hlo
from shardsim.xla.tpu.cache import Cache
from shardsim.xla.tpu.rows import load_rows
from shardsim.xla.tpu.service import Compilation, TpuCompiler

CASES = Path(__file__).with_name("programs.yaml")
_HEADER = "# Written by python -m shardsim.xla.inspect.programs; see docs/inspect.md.\n"
Row = dict[str, Any]


def features(plan: Plan) -> list[str]:
    """Return what of a plan makes its program another than a dense one of one slice."""
    layout = resolve(plan)
    found = {
        "host offload": any(group.offload for group in plan.remat.groups),
        "experts": plan.model.experts is not None,
        "pipeline": int(layout.pipeline.size) > 1,
        "slices": plan.machine.slices > 1,
        "context": int(layout.context.size) > 1,
        "collective matmul": plan.overlap.matmul != "off" and int(layout.tensor.size) > 1,
        "heads of two kinds": plan.model.global_heads is not None,
    }
    return [name for name, has in found.items() if has]


def row_of(made: Compilation) -> Row:
    """Return what the reader finds in a compiled program, or why there is none."""
    row: Row = {"machine": made.plan.machine.name, "features": features(made.plan)}
    row |= {"date": datetime.date.today().isoformat(), "versions": made.versions}
    if made.text is None:
        return row | {"problem": made.problem}
    try:
        found = inspect_hlo(made.text, made.plan.machine, axes=made.plan.mesh)
    except ShardsimError as error:
        return row | {"problem": f"not read: {error}"}
    return row | {
        "step_time_s": found.step_time_s and float(f"{found.step_time_s:.4g}"),
        "rows": len(found.rows),
        "unexpected": len(found.unexpected),
        "warnings": list(found.warnings),
    }


def of_evidence() -> Iterator[tuple[str, Row]]:
    """Yield programs that were read when the evidence was collected."""
    for row in load_rows():
        if "step_time_s" not in row:
            continue
        plan = plan_from_data(row["plan"], row["kind"])
        yield (
            f"{row['group']}, {row['kind']}",
            {
                "machine": plan.machine.name,
                "features": features(plan),
                "date": row["date"],
                "versions": row["versions"],
                "step_time_s": float(f"{row['step_time_s']:.4g}"),
                "rows": len(row["collectives"]),
                "unexpected": len(row["unplanned"]),
            },
        )


def plan_of(name: str, case: Row, shared: Row) -> Plan:
    """Return the plan of a case; its model has what is shared but for its own keys."""
    model = {**shared["model"], **case.get("model", {})}
    return plan_from_data({**shared, **case, "model": model}, name)


def main() -> None:
    """Compile and read what is not in the list yet."""
    parser = argparse.ArgumentParser(description="Programs that the reader has read.")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    cases = read_yaml(CASES)
    shared = cases.pop("shared")
    before = read_yaml(options.output)["programs"] if options.output.is_file() else {}
    rows: dict[str, Row] = {name: before[name] for name in cases if name in before}
    missing = [name for name in cases if name not in rows and options.only in name]
    plans = [plan_of(name, cases[name], shared) for name in missing]

    def write() -> None:
        every = {**dict(of_evidence()), **rows}
        kinds = Counter(kind for row in every.values() for kind in row["features"])
        read = sum("problem" not in row for row in every.values())
        data = {"read": read, "not_read": len(every) - read, "with": dict(kinds), "programs": every}
        write_text(options.output, _HEADER + yaml.safe_dump(data, sort_keys=False, width=96))

    write()
    with TpuCompiler(workers=1, cache=Cache()) as compiler:
        for index, made in compiler.compile_all(plans):
            rows[missing[index]] = row_of(made)
            write()
            print(f"{missing[index]}: {rows[missing[index]]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
