"""What emitted steps hold in HBM: many plans, compiled until their buffers are assigned.

`python -m shardsim.xla.tpu.held` compiles what is neither in the file yet nor in that of `collect`,
plan by plan, and may be interrupted at any time; `--only TEXT` takes plans with TEXT in their name,
`--anew` also those that are there, `--techniques`, `--blocks` and `--drawn` those of `techniques`,
`block_cases` and `drawn`, into their files. One takes 15 to 30 seconds of one core, a tenth of a
whole compilation. The plans are those of `cases`, and of models on other chips (`OTHERS`).
"""

from __future__ import annotations

from typing import Any

from shardsim.xla.tpu.cases import GROUPS, Group
from shardsim.xla.tpu.collect import asked, collect, head_of, parser_of, say, todo
from shardsim.xla.tpu.rows import HELD, load_rows
from shardsim.xla.tpu.service import Compilation, TpuCompiler

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


def main() -> None:
    """Collect what is held."""
    options = parser_of(__doc__).parse_args()
    path, rows, plans = asked(options, HELD, (*GROUPS, *OTHERS))
    missing = [*todo([*rows, *load_rows()], plans)]
    with TpuCompiler(
        workers=options.workers, timeout_s=options.timeout, worker=WORKER, progress=say
    ) as compiler:
        collect(path, rows, missing, compiler, row_of)


if __name__ == "__main__":
    main()
