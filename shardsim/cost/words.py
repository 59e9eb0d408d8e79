"""What the parts of a step and of HBM are called, wherever people read them."""

from __future__ import annotations

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
