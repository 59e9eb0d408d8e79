"""`export --to jax`: one self-contained train.py, put together from the runtime's own modules.

What differs from plan to plan is data, written as Python literals; the code is the text of
`shardsim.emit.runtime`, which the tests run as it stands. So nothing that a plan or a model file
says is ever code.
"""

from __future__ import annotations

import ast
import json
from importlib import resources
from typing import Any

import shardsim
from shardsim.emit.shrink import shrink
from shardsim.emit.specs import plan_data
from shardsim.errors import PlanError
from shardsim.plan import Plan

MODULES = (
    "host",
    "config",
    "collectives",
    "attention",
    "whole",
    "data",
    "explicit",
    "partitioned",
    "model",
    "train",
)
_RUNTIME = "shardsim.emit.runtime"
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
    imports, bodies = _runtime()
    parts = [
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
        "FULL = {\n"
        '    "plan": PLAN,\n'
        '    "model": MODEL,\n'
        '    "parameters": PARAMETERS,\n'
        '    "activations": ACTIVATIONS,\n'
        "}",
        _assign("A tiny copy with every axis and technique, to try the code on.", "TINY", tiny),
        *bodies,
        'if __name__ == "__main__":\n    main(FULL, TINY)',
    ]
    return "\n\n".join(parts) + "\n"


def _assign(comment: str, name: str, data: Any) -> str:
    return f"# {comment}\n{name} = {literal(data)}"


def module_text(name: str) -> str:
    """Return the source of one module of the runtime."""
    return resources.files(_RUNTIME).joinpath(f"{name}.py").read_text(encoding="utf-8")


def _runtime() -> tuple[str, list[str]]:
    """Return the import statements of all modules together, and the rest of each."""
    plain: set[str] = set()
    named: dict[str, set[str]] = {}
    bodies = []
    for name in MODULES:
        text = module_text(name)
        tree = ast.parse(text)
        last = 0
        for node in tree.body:
            if isinstance(node, ast.Import):
                plain |= {
                    f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                    for alias in node.names
                }
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                if not node.module.startswith(("shardsim", "__future__")):
                    named.setdefault(node.module, set()).update(a.name for a in node.names)
            else:
                continue
            last = max(last, node.end_lineno or 0)
        banner = "\n".join(
            f"# {line}".rstrip() for line in (ast.get_docstring(tree) or "").splitlines()
        )
        rest = "\n".join(text.splitlines()[last:]).strip("\n")
        bodies.append(f"\n# {'-' * 78}\n{banner}\n\n\n{rest}\n")
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in named.items()]
    given = ("jax", "numpy", "optax")
    groups = [
        sorted(x for x in plain if (x.split()[1].split(".")[0] in given) == wanted)
        + sorted(x for x in lines if (x.split()[1].split(".")[0] in given) == wanted)
        for wanted in (False, True)
    ]
    texts = ["from __future__ import annotations", *("\n".join(group) for group in groups)]
    return "\n\n".join(texts), bodies
