"""How trainers resolve sharding rules: the semantics of each rule language, and a checked order.

Logical rules (Flax, MaxText, big_vision's activations; flax.linen `logical_to_mesh_axes`) are
tried in order. A rule gives its mesh axes to the dimension of its name if that has none yet and
no other dimension took one of them; else it is passed over, and a later rule of the same name
may apply. A name without a rule is replicated without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardsim.emit.specs import Spec
from shardsim.errors import PlanError

Rule = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Array:
    """One array of a plan: what it is, the trainer's names of its dimensions, and where it lies.

    A name of None is a dimension that no rule can split.
    """

    what: str
    names: tuple[str | None, ...]
    spec: tuple[tuple[str, ...], ...]
    activation: bool = False

    @classmethod
    def of(
        cls, what: str, names: Sequence[str | None], spec: Spec, *, activation: bool = False
    ) -> Array:
        """Return an array whose spec is given as lists."""
        return cls(what, tuple(names), tuple(map(tuple, spec)), activation)


def resolve_names(names: Sequence[str | None], rules: Iterable[Rule]) -> Spec:
    """Return the spec that Flax makes of logical names under `rules`.

    >>> rules = [("embed", ("model",)), ("embed", ("data",)), ("mlp", ("model",))]
    >>> resolve_names(("embed", "mlp"), rules)
    [['model'], []]
    """
    spec: list[list[str] | None] = [None] * len(names)
    taken: set[str] = set()
    for logical, axes in rules:
        if logical not in names:
            continue
        at = names.index(logical)
        if spec[at] is None and not taken & set(axes):
            spec[at] = list(axes)
            taken |= set(axes)
    return [axes or [] for axes in spec]


def resolve_nnx(names: Sequence[str | None], rules: Iterable[Rule]) -> Spec:
    """Return the spec that Flax NNX gives a weight as it makes it (`flax.core.spmd`).

    It knows one rule a name, the last; a name without a rule is taken for a mesh axis, which is
    an error as a rule; and nothing keeps two dimensions from asking for one mesh axis.

    >>> resolve_nnx(("embed", "mlp"), [("embed", ("data",)), ("mlp", ("model",))])
    [['data'], ['model']]
    """
    by = {name: list(axes) for name, axes in rules}
    return [[] if name is None else by.get(name, [name]) for name in names]


def order_rules(arrays: Sequence[Array], inner: Sequence[str]) -> list[Rule]:
    """Return rules under which each of `arrays` gets its spec, if there are any to be found.

    Names in `inner` come first, because what a matmul computes must keep its mesh axes where
    another dimension of the array asks for them too. A name that is split in several ways asks
    for the most axes first: where another dimension holds one of them, the next rule applies.
    """
    wanted: dict[str, set[tuple[str, ...]]] = {}
    for array in arrays:
        for name, axes in zip(array.names, array.spec, strict=True):
            if name is not None:
                wanted.setdefault(name, set()).add(axes)

    def key(rule: Rule) -> tuple[int, str, int, tuple[str, ...]]:
        name, axes = rule
        rank = inner.index(name) if name in inner else len(inner)
        return rank, name, -len(axes), axes

    rules = sorted(
        ((name, axes) for name, ways in wanted.items() for axes in ways if axes or len(ways) > 1),
        key=key,
    )
    return _without_idle(arrays, rules)


def _without_idle(arrays: Sequence[Array], rules: list[Rule]) -> list[Rule]:
    """Return the rules without those that change nothing for any of `arrays`."""
    kept = list(rules)
    for rule in rules:
        rest = [other for other in kept if other != rule]
        own = [array for array in arrays if rule[0] in array.names]
        if all(resolve_names(a.names, rest) == resolve_names(a.names, kept) for a in own):
            kept = rest
    return kept


def check_rules(arrays: Iterable[Array], rules: Sequence[Rule], trainer: str) -> list[str]:
    """Return remarks on parameters that `rules` split further than the plan does.

    Raises `PlanError` if some array would lose a sharding, or an activation would gain one.
    """
    return [
        remark
        for array in arrays
        if (remark := compare(array, resolve_names(array.names, rules), trainer))
    ]


def compare(array: Array, found: Sequence[Sequence[str]], trainer: str) -> str | None:
    """Return a remark if `found` splits a parameter further than the plan; None if it agrees.

    Raises `PlanError` for anything else: a sharding that is lost, an activation that differs.
    """
    split = tuple(map(tuple, found))
    if split == array.spec:
        return None
    more = all(not axes or axes == got for axes, got in zip(array.spec, split, strict=True))
    if more and not array.activation:
        return f"{array.what}: {spec_text(split)} here, {spec_text(array.spec)} in the plan"
    names = ", ".join(str(name) for name in array.names)
    raise PlanError(
        f"export to {trainer}: {array.what} ({names}) would lie as {spec_text(split)} there, "
        f"not {spec_text(array.spec)} as planned; export to jax instead"
    )


def refuse_moments_apart(parameters: Mapping[str, Any], trainer: str) -> None:
    """Raise `PlanError` if moments are to lie otherwise than their weight."""
    for name, entry in parameters.items():
        if entry["optimizer_spec"] != entry["spec"]:
            raise PlanError(
                f"export to {trainer}: the moments of {name} lie as the weight does there"
            )


def spec_text(spec: Iterable[Sequence[str]]) -> str:
    """Return a spec in one line.

    >>> spec_text([["data", "fsdp"], []])
    '[data+fsdp, -]'
    """
    return "[" + ", ".join("+".join(axes) or "-" for axes in spec) + "]"
