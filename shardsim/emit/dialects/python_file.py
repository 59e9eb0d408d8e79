"""Python files that build the plan's mesh themselves, on the torus axes that the plan names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardsim.emit.jax_code import literal
from shardsim.emit.source import RUNTIME, module_text

_STANDARD = """from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any"""


def mesh_module(
    comment: str, imports: Sequence[str], values: Mapping[str, Any], code: str = ""
) -> str:
    """Return a module: comment, imports, `values` as literals, `build_mesh`, and `code`."""
    text = module_text(f"{RUNTIME}.config")
    body = text[text.index("# What the plan") :].rstrip()
    assigned = [f"{name} = {literal(value)}" for name, value in values.items()]
    parts = [comment, _STANDARD, "\n".join(imports), *assigned, body, *([code] if code else [])]
    return "\n\n".join(parts).rstrip() + "\n"
