"""What emitted steps hold in HBM: many plans, compiled until their buffers are assigned.

`python -m shardsim.xla.tpu.held` compiles what is neither in the file yet nor in that of `collect`,
plan by plan, and may be interrupted at any time; `--only TEXT` takes plans with TEXT in their name,
`--anew` also those that are there, `--techniques` and `--blocks` those of `techniques` and
`block_cases`, into the files of `collect`. One takes 15 to 30 seconds of one core, a tenth of a
whole compilation. The plans are those of `cases`, and of models on other chips (`OTHERS`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardsim.files import write_text
from shardsim.plan import Plan
from shardsim.xla.tpu.block_cases import blocks
from shardsim.xla.tpu.cases import GROUPS, Group, cases
from shardsim.xla.tpu.collect import head_of
from shardsim.xla.tpu.rows import BLOCKS, HELD, TECHNIQUES, load_rows
from shardsim.xla.tpu.service import Compilation, TpuCompiler
from shardsim.xla.tpu.techniques import GROUP, techniques

WORKER = "shardsim.xla.tpu.held_worker"
# Other models than those of `cases`, or on other chips.
OTHERS = (
    Group(model="llama2-7b", machine="v5p:4x4x4", batch=256, sequence=4096, attention="flash"),
    Group(model="maxtext-16b", machine="v6e:8x8", batch=256, sequence=2048),
    Group(model="gemma2-9b", machine="v5e:16x16", batch=256, sequence=4096, attention="flash"),
    Group(model="llama3-8b", machine="tpu7x:4x4x4", batch=256, sequence=8192, attention="flash"),
    Group(model="vit-h-14", machine="v4:4x4x4", batch=8192, sequence=257),
)


def row_of(group: str, kind: str, made: Compilation) -> dict[str, Any]:
    """Return what is kept of one compilation."""
    row = head_of(group, kind, made)
    if not made.ok:
        return row
    large = _too_large(made)
    memory = made.result["memory"]
    return row | {
        "compiled": not large,
        "does_not_fit": large,
        "arguments_bytes": memory["argument_size"],
        "allocated_bytes": memory["allocated_size"],
        "host_bytes": memory["host_size"],
        "at_peak": made.result["at_peak"],
    }


def _too_large(made: Compilation) -> bool:
    """Return whether more is reserved than there is: the compiler stops right after that."""
    chip = made.plan.machine.chip
    room = chip.hbm_usable_bytes / chip.devices_per_chip
    return bool(made.result["memory"]["allocated_size"] > room)


def todo(
    rows: list[dict[str, Any]], only: str = "", which: str = ""
) -> Iterator[tuple[str, str, Plan]]:
    """Yield the plans that are missing: one kind after another, each over all groups."""
    known = {(row["group"], row["kind"]) for row in rows}
    if which == "techniques":
        plans = {GROUP: techniques()}
    elif which == "blocks":
        plans = blocks()
    else:
        plans = {group.name: cases(group) for group in (*GROUPS, *OTHERS)}
    for kind in dict.fromkeys(kind for found in plans.values() for kind in found):
        for group, found in plans.items():
            new = kind in found and (group, kind) not in known
            if new and only in f"{group}: {kind}":
                yield group, kind, found[kind]


def main() -> None:
    """Collect what is held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="plans with this in their name")
    parser.add_argument("--anew", action="store_true", help="forget what is there of them")
    parser.add_argument("--techniques", action="store_true", help="those of `techniques` instead")
    parser.add_argument("--blocks", action="store_true", help="those of `block_cases` instead")
    parser.add_argument("--output", type=Path, help="instead of the project's file")
    options = parser.parse_args()
    which = "techniques" if options.techniques else "blocks" if options.blocks else ""
    output = options.output or {"techniques": TECHNIQUES, "blocks": BLOCKS}.get(which, HELD)
    rows = load_rows(output)
    if options.anew:
        rows = [row for row in rows if options.only not in f"{row['group']}: {row['kind']}"]
    missing = list(todo([*rows, *load_rows()], options.only, which))
    print(f"{len(rows)} plans are there, {len(missing)} to compile", file=sys.stderr)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with TpuCompiler(workers=options.workers, worker=WORKER, progress=say) as compiler:
        for index, made in compiler.compile_all([plan for _, _, plan in missing]):
            group, kind, _ = missing[index]
            rows.append(row_of(group, kind, made))
            rows.sort(key=lambda row: (row["group"], row["kind"]))
            write_text(str(output), json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
