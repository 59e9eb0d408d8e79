"""`export --to jax`: one self-contained train.py, put together from the project's own modules.

What differs from plan to plan is data, written as Python literals; the code is the text of
`shardsim.emit.runtime` and `shardsim.ops`, which the tests run as it stands. So nothing that a plan
or a model file says is ever code.
"""

from __future__ import annotations

import json
from typing import Any

import shardsim
from shardsim.emit.shrink import shrink
from shardsim.emit.source import program_text
from shardsim.emit.specs import plan_data
from shardsim.errors import PlanError
from shardsim.plan import Plan

_WIDTH = 96


def literal(data: Any, indent: int = 0) -> str:
    """Return plain data as a Python literal in ASCII; text can only appear inside quotes.

    >>> print(literal({"name": "a'b\\n", "sizes": [1, 2]}))
    {'name': "a'b\\n", 'sizes': [1, 2]}
    """
    text = repr(data).encode("ascii", "backslashreplace").decode("ascii")
    if indent + len(text) <= _WIDTH or not data or not isinstance(data, (dict, list, tuple)):
        return text
    inner = indent + 4
    if isinstance(data, dict):
        rows = [f"{literal(key, inner)}: {literal(value, inner)}" for key, value in data.items()]
    else:
        rows = [literal(value, inner) for value in data]
    opening, closing = text[0], text[-1]
    lines = "".join(f"{' ' * inner}{row},\n" for row in rows)
    return f"{opening}\n{lines}{' ' * indent}{closing}"


def header(plan: Plan) -> str:
    """Return the comment at the top of every emitted Python file: what it comes from."""
    words = {
        "plan": plan.name,
        "model": plan.model.name,
        "machine": plan.machine.name,
        "shardsim": shardsim.__version__,
    }
    lines = [f"#   {key}: {json.dumps(value)}" for key, value in words.items()]
    return "\n".join(["# Written by shardsim export.", *lines])


def jax_code(plan: Plan) -> str:
    """Return a train.py for `plan`: mesh, specs, remat, compiler options and the train step."""
    full = plan_data(plan)
    try:
        tiny: dict[str, Any] | None = plan_data(shrink(plan)[0])
    except PlanError:
        tiny = None
    calls = full["calls"]
    several = [calls, *(part["calls"] for part in full.get("parts", ()))]
    runs = [
        call["run"]
        for calls in several
        for part in (calls["before"], *(one["calls"] for one in calls["layers"]), calls["after"])
        for call in part
    ]
    imports, bodies = program_text(runs)
    texts = [
        header(plan) + "\n#\n"
        "#   python train.py                      on the machine of the plan\n"
        "#   python train.py --host-devices 8     its tiny copy, on devices made of the CPU\n"
        "#\n"
        "# or import it: Trainer(FULL, build_mesh(FULL['plan'])) has start, step and shardings.\n"
        "# Needs jax and optax (and numpy, which jax brings).",
        imports,
        _assign("The plan: mesh, torus axes of each mesh axis, techniques.", "PLAN", full["plan"]),
        _assign("The model's options.", "MODEL", full["model"]),
        _assign(
            "What runs before the layers, in each kind of them and after: functions by name, the "
            "arrays and\n# weights that they read, and the names under which results are kept.",
            "CALLS",
            full["calls"],
        ),
        _assign(
            "Every weight: shape, the mesh axes that split each dimension (of its optimizer state "
            "too),\n# and the standard deviation of its first values (0.0: ones).",
            "PARAMETERS",
            full["parameters"],
        ),
        _assign(
            "The mesh axes that split each dimension of each kind of activation.",
            "ACTIVATIONS",
            full["activations"],
        ),
        *(
            [_assign("The stacks that run before it.", "PARTS", full["parts"])]
            if "parts" in full
            else []
        ),
        "FULL = {\n"
        '    "plan": PLAN,\n'
        '    "model": MODEL,\n'
        '    "calls": CALLS,\n'
        '    "parameters": PARAMETERS,\n'
        '    "activations": ACTIVATIONS,\n'
        + ('    "parts": PARTS,\n' if "parts" in full else "")
        + "}",
        _assign("A tiny copy with every axis and technique, to try the code on.", "TINY", tiny),
        *bodies,
        'if __name__ == "__main__":\n    main(FULL, TINY)',
    ]
    return "\n\n".join(texts) + "\n"


def _assign(comment: str, name: str, data: Any) -> str:
    return f"# {comment}\n{name} = {literal(data)}"
