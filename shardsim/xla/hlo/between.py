"""What programs of several slices send between them.

The compiler makes one program for all slices, whose devices are those of one. A collective between
slices is a pair of `send` and `recv` through the hosts, marked with what it is
(`_xla_megascale_transfer_type`) and with a rendezvous that both share.
"""

from __future__ import annotations

import re

from shardsim.xla.hlo.module import Computation, Instruction

Part = tuple[str, int, int]  # mesh axis, members over slices, devices between them

_TYPE = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
}


def kind_of(item: Instruction) -> str:
    """Return the collective that a send or recv is a half of; empty for other transfers."""
    match = _TYPE.search(item.attributes.get("frontend_attributes", ""))
    return _KINDS.get(match[1], "") if match else ""


def rendezvous_of(item: Instruction) -> str:
    """Return what a send and its recv share."""
    match = _RENDEZVOUS.search(item.attributes.get("frontend_attributes", ""))
    return match[1] if match else ""


def array_bytes(computation: Computation, send: Instruction) -> float:
    """Return the bytes of the whole array: what is sent, or what comes back if that is more."""
    here = rendezvous_of(send)
    ends = [
        item.shape.arrays[0].bytes
        for item in computation.instructions.values()
        if item.opcode in ("send", "recv") and rendezvous_of(item) == here
    ]
    return max(ends)
