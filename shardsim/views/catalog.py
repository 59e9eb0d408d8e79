"""Tables of what is known: chips, slices, models, and the figures of one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter, itemgetter
from time import localtime, strftime
from typing import TYPE_CHECKING, Any

from shardsim.views.table import Column, Table, table

if TYPE_CHECKING:
    from shardsim.machine import Chip
    from shardsim.model import Model
    from shardsim.model.tensors import Tensor
    from shardsim.xla.tpu.cache import Entry


def chips(items: Iterable[Chip]) -> Table:
    """Return chips with their main figures."""
    columns = [
        Column("name", "chip", attrgetter("name")),
        Column("title", "", attrgetter("title")),
        Column("peak_bf16_flops", "bf16 peak", lambda chip: chip.peak("bf16"), "FLOP/s"),
        Column("hbm_usable_bytes", "usable HBM", attrgetter("hbm_usable_bytes"), "bytes"),
        Column("hbm_bytes_per_s", "HBM", attrgetter("hbm_bytes_per_s"), "B/s"),
        Column("link_bytes_per_s", "link, one way", attrgetter("link_bytes_per_s"), "B/s"),
        Column("links", "links", _links),
    ]
    return table(columns, items)


def _links(chip: Chip) -> str:
    return f"{chip.torus_dims}-D torus" if chip.interconnect == "torus" else "switch"


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def figures(items: Iterable[tuple[str, Mapping[str, Any]]]) -> Table:
    """Return a chip's figures, each with its source."""
    columns = [
        Column("figure", "figure", itemgetter(0)),
        Column("value", "value", lambda row: row[1].get("value"), show=_show),
        Column("status", "status", lambda row: row[1].get("status", "")),
        Column("source", "source", lambda row: row[1].get("source", "")),
    ]
    return table(columns, items)


def constants(values: Mapping[str, float]) -> Table:
    """Return fitted constants."""
    columns = [Column("constant", "constant", itemgetter(0))]
    return table([*columns, Column("value", "value", itemgetter(1), "g")], values.items())


def residuals(values: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return how far fitted op costs are from the compiler's, by kind of operation."""
    columns = [
        Column("operations", "operations", itemgetter(0)),
        Column("number", "number", lambda row: row[1]["ops"], "d"),
        Column("median", "median", lambda row: row[1]["median"], ".1f", "%"),
        Column("p90", "90th percentile", lambda row: row[1]["p90"], ".1f", "%"),
        Column("worst", "worst", lambda row: row[1]["worst"], ".1f", "%"),
        Column("worst_op", "worst at", lambda row: row[1]["worst_op"]),
    ]
    return table(columns, values.items())


def estimates(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return what the compiler and the fitted constants say of single operations."""
    columns = [
        Column("op", "operation", itemgetter("op")),
        Column("cycles", "estimated cycles", itemgetter("cycles"), ",d"),
        Column("fitted_cycles", "fitted", itemgetter("fitted_cycles"), ",.0f"),
    ]
    return table(columns, rows)


def models(items: Iterable[tuple[str, Model]]) -> Table:
    """Return models, each under the name of its preset; of several stacks, the main one."""
    whole = Column("parameters", "parameters", lambda model: model.parameters / 1e9, ",.3f", "B")
    own = [
        *(Column(key, key, attrgetter(key), "d") for key in ("layers", "embed", "mlp")),
        Column("heads", "heads", lambda model: f"{model.heads}x{model.head_dim}", right=True),
        Column("kv_heads", "kv heads", attrgetter("kv_heads"), "d"),
        Column("block", "block", lambda model: "parallel" if model.parallel_block else "serial"),
        Column("sequence", "tokens", attrgetter("sequence"), "d"),
    ]
    columns = [Column("name", "model", itemgetter(0)), whole.within(itemgetter(1))]
    return table([*columns, *(one.within(lambda item: item[1].main) for one in own)], items)


def counts(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return each model's parameters beside those that were published."""
    columns = [
        Column("name", "model", itemgetter("name")),
        Column("parameters", "parameters", itemgetter("parameters"), ",d"),
        Column("published", "published", itemgetter("published"), ",d"),
        Column("less", "less", lambda row: row["less"] or None, ",d"),
        Column("difference", "difference", itemgetter("difference"), ",d"),
        Column("within", "printed to", lambda row: row["within"] or None, ",d"),
        Column("why", "without", itemgetter("why")),
        Column("source", "source", itemgetter("source")),
    ]
    return table(columns, rows)


def tensors(items: Iterable[Tensor]) -> Table:
    """Return the weights of a model."""
    columns = [
        Column("name", "weight", attrgetter("name")),
        Column("axes", "axes", attrgetter("axes"), show=" x ".join),
        Column(
            "shape", "shape", attrgetter("shape"), show=lambda sizes: " x ".join(map(str, sizes))
        ),
        Column("stack", "copies", attrgetter("stack"), "d"),
    ]
    return table(columns, items)


NAMED = 30  # letters of an entry's name


def kept(items: Iterable[Entry]) -> Table:
    """Return what a cache holds."""
    columns = [
        Column("kind", "kind", attrgetter("kind")),
        Column("name", "name", lambda one: one.path.stem[:NAMED]),
        Column("bytes", "size", attrgetter("size_bytes"), "bytes"),
        Column("time", "written", lambda one: strftime("%Y-%m-%d %H:%M", localtime(one.time_s))),
    ]
    return table(columns, items)
