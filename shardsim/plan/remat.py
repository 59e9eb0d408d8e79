"""Rematerialisation: which tensors of a layer are kept for the backward pass.

A policy is a set of kept tensors; whatever the backward pass needs and did not keep is computed
again. The names are those of the block, not of a trainer:

| tensor | what it is |
| --- | --- |
| qkv | queries, keys and values |
| context | the attention's result before its output projection |
| attention_output | the output projection's result (a serial block adds it to the residual) |
| mlp_hidden | the MLP's input projection(s) |
| mlp_output | the MLP's output projection's result: kept by `dots`, never needed |
| rest | norms, activated hidden layer, attention probabilities: everything else |

The layer's input is always kept: layers run under a scan, and that is the scan's carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardsim.errors import PlanError, nearest

TENSORS = ("qkv", "context", "attention_output", "mlp_hidden", "mlp_output", "rest")

POLICIES: Mapping[str, frozenset[str]] = {
    "none": frozenset(TENSORS),
    "full": frozenset(),
    "dots": frozenset({"qkv", "attention_output", "mlp_hidden", "mlp_output"}),
    "dots_and_context": frozenset(
        {"qkv", "context", "attention_output", "mlp_hidden", "mlp_output"}
    ),
    "save_attention": frozenset({"qkv", "context"}),
    "save_qkv": frozenset({"qkv"}),
    "save_context": frozenset({"context"}),
    "save_mlp": frozenset({"mlp_hidden"}),
    "save_context_and_mlp": frozenset({"context", "mlp_hidden"}),
}


@dataclass(frozen=True, kw_only=True)
class Remat:
    """The tensors kept on the device and those kept in the host's memory."""

    save: frozenset[str] = frozenset()
    offload: frozenset[str] = frozenset()  # also accepts "layer_input"

    def keeps(self, tensor: str) -> bool:
        """Return whether `tensor` survives to the backward pass, on the device or the host."""
        return tensor in self.save or tensor in self.offload

    def flags(self) -> dict[str, bool]:
        """Return the `keep_*` fields of a layout."""
        return {f"keep_{tensor}": self.keeps(tensor) for tensor in TENSORS}

    @property
    def name(self) -> str:
        """The policy's name, or a list of what is kept."""
        if not self.offload:
            for name, kept in POLICIES.items():
                if kept == self.save:
                    return name
        parts = ["save " + "+".join(sorted(self.save))] if self.save else []
        if self.offload:
            parts.append("offload " + "+".join(sorted(self.offload)))
        return ", ".join(parts) or "full"

    def to_data(self) -> Any:
        """Return what a plan file holds: the policy's name, or its two lists."""
        if self.name in POLICIES:
            return self.name
        data = {"save": sorted(self.save)}
        return data | {"offload": sorted(self.offload)} if self.offload else data


def parse_remat(data: Any, where: str) -> Remat:
    """Read a policy's name or `{save: [...], offload: [...]}`."""
    if isinstance(data, Mapping):
        for key in data:
            if key not in ("save", "offload"):
                raise PlanError(f"{where}: unknown key '{key}'{nearest(key, ('save', 'offload'))}")
        save = _tensors(data.get("save", []), f"{where}.save", TENSORS)
        offload = _tensors(data.get("offload", []), f"{where}.offload", (*TENSORS, "layer_input"))
        if both := save & offload:
            raise PlanError(f"{where}: '{min(both)}' is both saved and offloaded")
        return Remat(save=save, offload=offload)
    if data is None:
        data = "none"
    if not isinstance(data, str) or data not in POLICIES:
        raise PlanError(f"{where}: unknown remat policy '{data}'{nearest(data, POLICIES)}")
    return Remat(save=POLICIES[data])


def _tensors(data: Any, where: str, choices: tuple[str, ...]) -> frozenset[str]:
    if not isinstance(data, (list, tuple)):
        raise PlanError(f"{where}: expected a list of tensors out of {', '.join(choices)}")
    for name in data:
        if name not in choices:
            raise PlanError(f"{where}: unknown tensor '{name}'{nearest(name, choices)}")
    return frozenset(data)
