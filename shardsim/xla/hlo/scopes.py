"""What the scopes in JAX's name of an operation say: its phase, and what a collective is for."""

from __future__ import annotations

from collections.abc import Mapping

# The scopes of the emitted code, outermost first, and the purpose of `Move` that each stands for.
SCOPES: Mapping[str, str] = {
    "reduce_small_gradients": "small gradients",
    "reduce_shared_gradients": "shared gradients",
    "reduce_gradients": "gradient reduction",
    "update": "updated parameters",
    "optimizer_update": "optimizer",
    "loss": "loss",
    "tables": "tables",
    "end_weights": "ends",
    "gather_weights": "weights",
    "stage_boundary": "stage boundary",
    "conditions": "conditions",
    "contrast": "contrast",
    "pooling": "pooling",
    "predictions": "predictions",
    "loss_statistics": "loss statistics",
    "norm_statistics": "norm statistics",
    "look_up": "vocabulary",
    "head": "vocabulary",
    "keys": "keys and values",
    "switch": "switched tokens",
    "second_axis": "second axis",
    "experts": "experts",
    "memory": "memory",
    "index": "index",
    "adapters": "adapters",
    "output_gradient": "block",
    "input_gradient": "block",
    "tensor_output": "block",
    "tensor_input": "block",
}
_UPDATES = ("optimizer_update", "/update/", "/update_")


def purpose_of(op_name: str) -> str:
    """Return what a collective is for; "other" where no scope says it.

    >>> purpose_of("jit(step)/transpose(jvp(pooling))/tensor_input/all_gather")
    'pooling'
    """
    parts = set(op_name.replace("(", "/").replace(")", "/").split("/"))
    return next((purpose for name, purpose in SCOPES.items() if name in parts), "other")


def phase_of(op_name: str, before: str) -> str:
    """Return the phase that an operation's name says, or the one before it.

    >>> phase_of("jit(step)/transpose(jvp())/while/body/rematted_computation/add", "forward")
    'recomputation'
    """
    if "rematted_computation" in op_name:
        return "recomputation"
    if "transpose(" in op_name:
        return "backward"
    if any(scope in op_name for scope in _UPDATES):
        return "update"
    return "forward" if "jvp(" in op_name else before
