"""What parts of a step, of HBM and figures of a chip are called, wherever people read them."""

from __future__ import annotations

from shardsim.machine import Chip

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
    """Return what a figure of a chip is called: links behind a switch are NVLink."""
    words = FIGURES[figure]
    return words.replace("ICI", "NVLink") if chip.interconnect == "switch" else words
