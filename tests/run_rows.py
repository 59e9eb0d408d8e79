"""Rows of a runs file to test with."""

from __future__ import annotations

from typing import Any

from shardsim.validate.rows import Run, read_run
from shardsim.validate.to_plan import plans_of

LLAMA: dict[str, Any] = {
    "id": "row",
    "model": "llama2-7b",
    "chip": "v5p",
    "chips": 64,
    "parallelism": {"fsdp": 64},
    "global_batch": 256,
    "seq": 4096,
    "remat": "full",
}


def run_of(**changes: Any) -> Run:
    """Return the run of the row above with some keys changed; None removes one."""
    row = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    return read_run(row, "runs.yaml")


def sizes_of(**changes: Any) -> dict[str, int]:
    """Return the mesh that such a row is planned with."""
    return {axis.name: axis.size for axis in plans_of(run_of(**changes))[0].mesh}
