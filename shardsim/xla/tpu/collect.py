"""The compiled evidence: many plans, each predicted and compiled, kept as data with versions.

`python -m shardsim.xla.tpu.collect` compiles what is not in the file yet, plan by plan, and may
be interrupted at any time; `--anew` forgets what is there, `--only TEXT` is for the plans that have
it in their group or kind. It takes about a minute of one core a plan. `--techniques` does the same
for the plans of `techniques`, in their own file. Predictions are not kept: they are made anew
wherever the evidence is used.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardsim.errors import ShardsimError
from shardsim.executors import executor_of
from shardsim.files import write_text
from shardsim.plan import Plan
from shardsim.plan.io import plan_to_data
from shardsim.xla.tpu.block_cases import blocks
from shardsim.xla.tpu.cache import Cache
from shardsim.xla.tpu.cases import GROUPS, Group, cases
from shardsim.xla.tpu.drawn import drawn
from shardsim.xla.tpu.evidence import Evidence
from shardsim.xla.tpu.rows import BLOCKS, DATA, DRAWN, TECHNIQUES, load_rows
from shardsim.xla.tpu.service import TIMEOUT_S, Compilation, TpuCompiler
from shardsim.xla.tpu.techniques import GROUP, techniques

LISTED = 3  # of what is unplanned, costliest first


def head_of(group: str, kind: str, made: Compilation) -> dict[str, Any]:
    """Return what is kept of every compilation."""
    return {
        "group": group,
        "kind": kind,
        "plan": plan_to_data(made.plan),
        "compiled": made.ok,
        "problem": None if made.ok else made.problem,
        "does_not_fit": made.does_not_fit,
        "peak_bytes": made.peak_bytes,
        "versions": made.versions,
        "date": datetime.date.today().isoformat(),
    }


def row_of(group: str, kind: str, made: Compilation) -> dict[str, Any]:
    """Return what is kept of one compilation."""
    row = head_of(group, kind, made)
    if not made.ok:
        return row
    try:
        evidence = Evidence(made)
    except ShardsimError as error:
        return row | {"problem": f"not read: {error}"}
    data = evidence.to_data()
    unplanned = evidence.unplanned
    return row | {
        "state_bytes": data["hbm"]["compiled_state_bytes"],
        "flops": data["flops"]["compiled"],
        "operations_s": data["compute"]["compiled_s"],
        "exposed_comm_s": data["exposed_comm"]["replayed_s"],
        "step_time_s": data["step"]["replayed_s"],
        "mfu": data["mfu"]["replayed"],
        "collectives": data["collectives"],
        "collectives_as_planned": evidence.ok,
        "unplanned_exposed_s": sum(item.exposed_s for item in unplanned),
        "unplanned": [item.to_data() for item in unplanned[:LISTED]],
    }


def is_held(row: dict[str, Any]) -> bool:
    """Return whether a row was compiled no further than to what is in HBM (`held`)."""
    return "allocated_bytes" in row


Rows = list[dict[str, Any]]
Plans = Mapping[str, Mapping[str, Plan]]  # by group and kind


def plans_of(groups: Iterable[Group] = GROUPS) -> Plans:
    """Return the plans of groups: as they stand, those of the evidence."""
    return {group.name: cases(group) for group in groups}


def todo(rows: Iterable[dict[str, Any]], plans: Plans) -> Iterator[tuple[str, str, Plan]]:
    """Yield the plans that no row is of: one kind after another, each over all groups."""
    known = {(row["group"], row["kind"]) for row in rows}
    for kind in dict.fromkeys(kind for found in plans.values() for kind in found):
        for group, found in plans.items():
            if kind in found and (group, kind) not in known:
                yield group, kind, found[kind]


def say(text: str) -> None:
    """Tell whoever waits for compilations."""
    print(text, file=sys.stderr, flush=True)


def collect(
    path: Path,
    rows: Rows,
    missing: Sequence[tuple[str, str, Plan]],
    compiler: TpuCompiler,
    row_of: Callable[[str, str, Compilation], dict[str, Any]] = row_of,
) -> None:
    """Compile what is missing and keep a row of each in `path`, beside `rows`, as it comes."""
    say(f"{len(rows)} plans are there, {len(missing)} to compile")
    for index, made in compiler.compile_all([plan for _, _, plan in missing]):
        group, kind, _ = missing[index]
        rows = [row for row in rows if (row["group"], row["kind"]) != (group, kind)]
        rows.append(row_of(group, kind, made))
        rows.sort(key=lambda row: (row["group"], row["kind"]))
        write_text(str(path), json.dumps({"rows": rows}, indent=1) + "\n")


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """Return what reads the options that collecting has in common; the first of `text`'s lines
    says what it is for."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0] if text else "")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds for one plan")
    parser.add_argument("--anew", action="store_true", help="forget what is there of them")
    parser.add_argument("--techniques", action="store_true", help="those of `techniques` instead")
    parser.add_argument("--blocks", action="store_true", help="those of `block_cases` instead")
    parser.add_argument("--drawn", action="store_true", help="those of `drawn` instead")
    parser.add_argument("--only", default="", help="plans with this in their name, GROUP: KIND")
    parser.add_argument("--output", type=Path, help="instead of the project's file")
    return parser


def asked(
    options: argparse.Namespace, path: Path, groups: Iterable[Group]
) -> tuple[Path, Rows, Plans]:
    """Return the file, the rows to keep of it and the plans that the options ask for: usually of
    `groups`, in `path`."""
    plans: Plans
    if options.techniques:
        path, plans = TECHNIQUES, {GROUP: techniques()}
    elif options.blocks:
        path, plans = BLOCKS, blocks()
    elif options.drawn:
        path, plans = DRAWN, drawn()
    else:
        plans = plans_of(groups)

    def is_asked(group: str, kind: str) -> bool:
        return options.only in f"{group}: {kind}"

    path = options.output or path
    rows = load_rows(path)
    if options.anew:
        rows = [row for row in rows if not is_asked(row["group"], row["kind"])]
    return (
        path,
        rows,
        {
            group: {kind: plan for kind, plan in found.items() if is_asked(group, kind)}
            for group, found in plans.items()
        },
    )


def main() -> None:
    """Collect the evidence."""
    parser = parser_of(__doc__)
    parser.add_argument("--most", type=int, help="compile no more than so many plans")
    parser.add_argument("--scheduler", help="compile on the Dask cluster at this address")
    options = parser.parse_args()
    path, rows, plans = asked(options, DATA, GROUPS)
    missing = [*todo((row for row in rows if not is_held(row)), plans)][: options.most]
    with (
        executor_of(1, options.scheduler) as executor,
        TpuCompiler(
            workers=options.workers,
            timeout_s=options.timeout,
            executor=executor,
            cache=Cache(),
            progress=say,
        ) as compiler,
    ):
        collect(path, rows, missing, compiler)


if __name__ == "__main__":
    main()
