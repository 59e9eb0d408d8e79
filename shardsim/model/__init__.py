"""Models: what they are made of, their weights, and their FLOPs."""

from shardsim.model.catalog import (
    HfModel,
    load_hf,
    load_model,
    load_model_file,
    model_aliases,
    model_names,
    override_model,
)
from shardsim.model.delta import Delta
from shardsim.model.experts import Experts
from shardsim.model.flops import (
    Accounting,
    accounting_named,
    attention_flops_per_token,
    forward_matmul_flops_per_token,
    mfu,
    model_flops_per_token,
    tokens_per_s_at_mfu,
)
from shardsim.model.index import Index
from shardsim.model.latent import Latent
from shardsim.model.published import Published, published_count
from shardsim.model.spec import Biases, Model
from shardsim.model.tensors import Tensor, parameters

__all__ = [
    "Accounting",
    "Biases",
    "Delta",
    "Experts",
    "HfModel",
    "Index",
    "Latent",
    "Model",
    "Published",
    "Tensor",
    "accounting_named",
    "attention_flops_per_token",
    "forward_matmul_flops_per_token",
    "load_hf",
    "load_model",
    "load_model_file",
    "mfu",
    "model_aliases",
    "model_flops_per_token",
    "model_names",
    "override_model",
    "parameters",
    "published_count",
    "tokens_per_s_at_mfu",
]
