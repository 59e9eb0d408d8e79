"""Models: what they are made of, their weights, and their FLOPs."""

from shardsim.model.catalog import (
    load_model,
    load_model_file,
    model_aliases,
    model_names,
    override_model,
)
from shardsim.model.spec import Biases, Model
from shardsim.model.tensors import Tensor, parameters

__all__ = [
    "Biases",
    "Model",
    "Tensor",
    "load_model",
    "load_model_file",
    "model_aliases",
    "model_names",
    "override_model",
    "parameters",
]
