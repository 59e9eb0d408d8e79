"""The kept rows of the compiled evidence. Reading them needs neither JAX nor a compiler."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from shardsim.plan import Plan

_HERE = Path(str(resources.files("shardsim.xla.tpu")))
DATA = _HERE / "evidence.json"
HELD = _HERE / "held.json"  # of `held`: what is in HBM alone
TECHNIQUES = _HERE / "techniques.json"  # of `techniques`
BLOCKS = _HERE / "blocks.json"  # of `block_cases`
DRAWN = _HERE / "drawn.json"  # of `drawn`, that no rule was read off


def load_rows(path: Path = DATA) -> list[dict[str, Any]]:
    """Return the kept rows, in the order in which they were compiled."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def as_compiled(plan: Plan) -> Plan:
    """Return `plan` priced by what its chips' compiler estimates."""
    return replace(plan, op_costs="compiler")
