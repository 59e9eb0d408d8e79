"""Rematerialisation: which tensors of a layer are kept for the backward pass.

A policy is a set of kept tensors; whatever the backward pass needs and did not keep is computed
again. The names are those of the block, not of a trainer:

| tensor | what it is |
| --- | --- |
| qkv | queries, keys and values, and latents that they come from |
| context | the attention's result before its output projection |
| attention_output | the output projection's result (a serial block adds it to the residual) |
| mlp_hidden | the MLP's input projection(s) |
| mlp_output | the MLP's output projection's result: kept by `dots`, never needed |
| statistics | sums of norms, a number or two of each row or head, which a pass of their own makes |
| rest | norms and their statistics, activated hidden layer, attention probabilities: all else |

Of experts `mlp_output` is what they make of every copy of a token, before it is brought back: where
they lie behind a router it is needed.

The layer's input is always kept: layers run under a scan, and that is the scan's carry. All layers
keep the same, or groups of them that follow each other keep something else each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardsim.errors import PlanError, instead, nearest, shown

TENSORS = (
    *("qkv", "context", "attention_output", "mlp_hidden", "mlp_output"),
    *("statistics", "rest"),
)

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
class Policy:
    """The tensors kept on the device and those kept in the host's memory, by layers in a row."""

    save: frozenset[str] = frozenset()
    offload: frozenset[str] = frozenset()  # also accepts "layer_input"
    layers: int = 0  # 0: all that the model has

    def __post_init__(self) -> None:
        for kept, other in (("save", self.offload), ("offload", self.save)):
            names = getattr(self, kept)
            if "rest" in names and "statistics" not in other:  # which are of the rest
                object.__setattr__(self, kept, names | {"statistics"})

    @property
    def kept(self) -> frozenset[str]:
        """What survives to the backward pass, on the device or the host."""
        return (self.save | self.offload) & frozenset(TENSORS)

    @property
    def name(self) -> str:
        """The policy's name, or a list of what is kept."""
        if not self.offload:
            for name, kept in POLICIES.items():
                if kept == self.save:
                    return name
        parts = ["save " + " + ".join(sorted(self.save))] if self.save else []
        if self.offload:
            parts.append("offload " + " + ".join(sorted(self.offload)))
        return ", ".join(parts) or "full"

    def lists(self) -> dict[str, Any]:
        """Return how many layers keep what, as plain data."""
        data: dict[str, Any] = {"layers": self.layers} if self.layers else {}
        data["save"] = sorted(self.save)
        return data | {"offload": sorted(self.offload)} if self.offload else data


# What a search may keep in the host's memory: results of matmuls, each of which takes longer to
# make than to fetch where a layer is wide. Beside queries, keys and values there, sums of norms and
# hidden layers may be kept on the device: so it was compiled (docs/compiled.md); other pairs were
# not. With inputs of layers there too nothing of a layer stays on the device.
OFFLOADS: tuple[Policy, ...] = (
    Policy(save=frozenset({"statistics"}), offload=frozenset({"qkv"})),
    Policy(save=frozenset({"statistics", "mlp_hidden"}), offload=frozenset({"qkv"})),
    Policy(offload=frozenset({"mlp_hidden"})),
    Policy(offload=frozenset({"layer_input", "qkv"})),
)


@dataclass(frozen=True)
class Remat:
    """What layers keep: groups of them, first to last, no two in a row with the same policy."""

    groups: tuple[Policy, ...] = (Policy(),)

    def __post_init__(self) -> None:
        joined: list[Policy] = []
        for group in self.groups:
            if joined and replace(joined[-1], layers=group.layers) == group:
                group = replace(group, layers=joined.pop().layers + group.layers)
            joined.append(group)
        object.__setattr__(self, "groups", tuple(joined))

    @classmethod
    def of(cls, save: frozenset[str] = frozenset(), offload: frozenset[str] = frozenset()) -> Remat:
        """Return one policy for all layers."""
        return cls((Policy(save=save, offload=offload),))

    @property
    def name(self) -> str:
        """The name of the policy; of several how many layers have each."""
        if len(self.groups) == 1:
            return self.groups[0].name
        return ", ".join(f"{group.layers} x {group.name}" for group in self.groups)

    def only(self, what: str) -> Policy:
        """Return the policy of all layers; raise `PlanError` if they differ, which `what` does not
        have."""
        if len(self.groups) > 1:
            raise PlanError(
                f"remat: {what} has one policy for all layers, not {len(self.groups)} groups of "
                "them; give one"
            )
        return self.groups[0]

    def to_data(self) -> Any:
        """Return what a plan file holds: the policy's name, its two lists, or a list of groups."""
        if len(self.groups) > 1:
            return [group.lists() for group in self.groups]
        (policy,) = self.groups
        return policy.name if policy.name in POLICIES else replace(policy, layers=0).lists()

    def check(self, layers: int, round_layers: int) -> None:
        """Raise `PlanError` unless groups have all `layers` of a model, in whole rounds."""
        if self.groups == (replace(self.groups[0], layers=0),):
            return
        for number, group in enumerate(self.groups):
            if group.layers < 1 or group.layers % round_layers:
                rounds = f" that divides by the {round_layers} of a round"
                raise PlanError(
                    f"remat[{number}].layers: must be a positive whole number"
                    f"{rounds if round_layers > 1 else ''}, not {group.layers}"
                )
        if (total := sum(group.layers for group in self.groups)) != layers:
            raise PlanError(f"remat: its groups have {total} layers, the model has {layers}")


def parse_remat(data: Any, where: str, layers: int) -> Remat:
    """Read what the `layers` of a model keep: a name, `{save: [...], offload: [...]}`, or a list
    of groups of layers, each `{layers: 2, save: [...], offload: [...]}`."""
    if not isinstance(data, list):
        return Remat((_policy(data, where, ("save", "offload")),))
    if data and all(isinstance(name, str) and name in TENSORS for name in data):
        raise PlanError(f"{where}: a list is of groups of layers; write {{save: {_list(data)}}}")
    if not data:
        raise PlanError(f"{where}: an empty list; give groups such as {{layers: 2, save: []}}")
    groups = []
    for number, entry in enumerate(data):
        here = f"{where}[{number}]"
        if not isinstance(entry, Mapping) or "layers" not in entry:
            hint = instead(data, tuple(POLICIES))
            raise PlanError(
                f"{here}: expected a group of layers, such as {{layers: 2, save: []}}{hint}"
            )
        many = entry["layers"]
        if isinstance(many, bool) or not isinstance(many, int) or many < 1:
            raise PlanError(f"{here}.layers: must be a positive whole number, not {shown(many)}")
        groups.append(_policy(entry, here, ("layers", "save", "offload")))
    remat = Remat(tuple(groups))
    first, *others = remat.groups
    return remat if others or first.layers != layers else Remat.of(first.save, first.offload)


def _policy(data: Any, where: str, keys: tuple[str, ...]) -> Policy:
    if isinstance(data, Mapping):
        for key in data:
            if key not in keys:
                raise PlanError(f"{where}: unknown key '{key}'{nearest(key, keys)}")
        save = _tensors(data.get("save", []), f"{where}.save", TENSORS)
        offload = _tensors(data.get("offload", []), f"{where}.offload", (*TENSORS, "layer_input"))
        if both := save & offload:
            raise PlanError(f"{where}: '{min(both)}' is both saved and offloaded")
        return Policy(save=save, offload=offload, layers=data.get("layers", 0))
    if data is None:
        raise PlanError(f"{where}: is empty; name a policy, such as full or none")
    if not isinstance(data, str) or data not in POLICIES:
        hint = _in_words(data) or nearest(data, POLICIES)
        raise PlanError(f"{where}: unknown remat policy '{data}'{hint}")
    return Policy(save=POLICIES[data])


def _list(names: Iterable[str]) -> str:
    return f"[{', '.join(names)}]"


def _in_words(data: Any) -> str:
    """Return how a file says what tables write as `save qkv + context, offload mlp_hidden`."""
    parts = []
    for part in str(data).split(", "):
        word, _, rest = part.partition(" ")
        names = rest.split(" + ")
        if word not in ("save", "offload") or not set(names) <= {*TENSORS, "layer_input"}:
            return ""
        parts.append(f"{word}: {_list(names)}")
    return f"; write {{{', '.join(parts)}}}"


def _tensors(data: Any, where: str, choices: tuple[str, ...]) -> frozenset[str]:
    if not isinstance(data, (list, tuple)):
        hint = f"; write [{data}]" if isinstance(data, str) and data in choices else ""
        raise PlanError(f"{where}: expected a list of tensors out of {', '.join(choices)}{hint}")
    for name in data:
        if name not in choices:
            raise PlanError(f"{where}: unknown tensor '{name}'{nearest(name, choices)}")
    return frozenset(data)
