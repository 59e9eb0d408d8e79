"""Groups of a model's weights, by what happens to their gradients.

A matrix or table is gathered along embed before use and its gradient is scattered back; then it is
summed over the devices that hold the same part. A vector (bias, scale, probe) is stored whole, but
for what the tensor axis splits, and its gradient is summed over everyone else.
"""

from __future__ import annotations

from shardsim.model import Model, Tensor


def is_matrix(tensor: Tensor) -> bool:
    """Return whether a weight is a matrix or a table rather than a vector."""
    return tensor.kind != "vector"


def block_matrices(model: Model) -> list[Tensor]:
    """Return the matrices of the layers."""
    return [t for t in model.tensors if is_matrix(t) and t.part == "block"]


def vocabulary(model: Model) -> list[Tensor]:
    """Return the token embedding and the output head, as far as the model has them."""
    return [t for t in model.tensors if is_matrix(t) and "vocab" in t.axes]


def end_matrices(model: Model) -> list[Tensor]:
    """Return the other matrices and tables before and after the layers."""
    return [
        t for t in model.tensors if is_matrix(t) and t.part != "block" and "vocab" not in t.axes
    ]


def vectors(model: Model) -> list[Tensor]:
    """Return biases, scales, probes and the class token."""
    return [t for t in model.tensors if not is_matrix(t)]
