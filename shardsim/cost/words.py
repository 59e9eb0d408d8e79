"""What parts of a step, of HBM and figures of a chip are called, wherever people read them."""

from __future__ import annotations

import re

from shardsim.machine import Chip, Machine

DCN = "dcn"  # the axis over slices, or nodes

PARTS = {
    "compute_s": "matrix and vector units",
    "hbm_bound_s": "waiting for HBM",
    "exposed_comm_s": "exposed communication",
    "bubble_s": "pipeline bubble",
    "overhead_s": "starting operations",
}
HBM = {
    "parameters_bytes": "parameters",
    "optimizer_bytes": "optimizer state",
    "gradients_bytes": "gradients",
    "activations_bytes": "saved activations",
    "workspace_bytes": "gathered weights and workspace",
}
FIGURES = {
    "peak_flops": "matrix unit peak",
    "vector_flops": "vector unit rate",
    "hbm_bytes_per_s": "HBM bandwidth",
    "link_bytes_per_s": "ICI link bandwidth",
    "hop_latency_s": "ICI hop latency",
    "collective_overhead_s": "start of a collective",
    "dcn_bytes_per_s": "DCN bandwidth",
    "dcn_hop_latency_s": "DCN latency",
    "pcie_bytes_per_s": "host link bandwidth",
}


def figure_words(figure: str, chip: Chip) -> str:
    """Return what a figure of a chip is called: of GPUs NVLink's, and nodes for slices."""
    words = FIGURES[figure]
    if chip.interconnect != "switch":
        return words
    link, of = ("NVLink", "NVLink") if chip.kind == "gpu" else ("switch link", "switch")
    words = words.replace("ICI link", link).replace("ICI", of)
    return re.sub(r"DCN (\w+)", r"\1 between nodes", words)


def links_words(machine: Machine, axis: str) -> str:
    """Return what the links of a machine's axis are called: of a torus, or those of nodes."""
    if axis == DCN:
        switched = machine.chip.interconnect == "switch"
        return "the network between nodes" if switched else "the data-centre network"
    node = "NVLink in a node" if machine.chip.kind == "gpu" else "the switch"
    named = {"node": node, "core": "the dies of a chip"}
    return named.get(axis, f"torus axis {axis}")
