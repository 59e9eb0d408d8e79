"""A real program of an H100 (a Llama of 1 B, one device; jax 0.11.2, CUDA 13) beside its plan.

Its trace is made by hand: every operation twice, a microsecond longer than the one before it.
"""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest
from making import US, Row, chrome

from shardsim.plan import plan_from_data
from shardsim.xla.hlo.opcodes import FREE
from shardsim.xla.hlo.text import parse_module
from shardsim.xla.profile.lined import LinedUp, line_up

PLAN = {
    "name": "llama",
    "model": {
        "name": "llama-1b",
        "family": "decoder",
        "layers": 22,
        "embed": 2048,
        "mlp": 5632,
        "heads": 32,
        "kv_heads": 4,
        "vocab": 32000,
        "sequence": 2048,
        "gated_mlp": True,
        "activation": "silu",
        "causal": True,
        "norm": "rmsnorm",
        "positions": "rotary",
    },
    "machine": "h100:1",
    "batch": 8,
    "mesh": {"data": 1},
    "rules": {"activations": {"batch": ["data"]}},
    "remat": "full",
    "attention": "unfused",
}
HELD = ("while", "fusion-done")  # no kernels


@pytest.fixture(scope="module")
def lined(tmp_path_factory: pytest.TempPathFactory) -> LinedUp:
    folder = tmp_path_factory.mktemp("gpu")
    packed = Path(__file__).parent / "data" / "llama-h100.hlo.xz"
    text = lzma.decompress(packed.read_bytes()).decode()
    module = parse_module(text)
    running = [module.computations[module.entry]]
    for computation in running:  # grows by the loops' bodies
        for item in computation.instructions.values():
            if item.opcode == "while":
                running.append(module.computations[item.attribute("body").removeprefix("%")])
    items = [
        item
        for computation in running
        for item in computation.instructions.values()
        if item.opcode not in FREE and item.opcode not in HELD
    ]
    rows: list[Row] = []
    at = 0.0
    for _ in range(2):
        for length, item in enumerate(items, 1):
            kernel = "nvjet_tst" if item.opcode == "custom-call" else item.name.replace(".", "_")
            told = {"hlo_module": "jit_step", "program_id": 3, "hlo_op": item.name}
            rows.append((kernel, at, float(length), told))
            at += length
    trace = chrome(folder / "t.json.gz", {("/device:GPU:0", "Stream #13(Compute)"): rows})
    hlo = folder / "step.hlo"
    hlo.write_text(text)
    return line_up(plan_from_data(PLAN, "test"), trace, hlo)


def test_every_operation_is_in_one_row(lined):
    names = [op.op for row in lined.rows for op in row.ops]
    assert len(names) == len(set(names)) == len(lined.profile.ops)
    many = len(names)
    assert many > 150
    assert lined.profile.step_s == pytest.approx(many * (many + 1) / 2 * US)
    assert sum(row.measured_s for row in lined.rows) == pytest.approx(lined.profile.step_s)
    predicted_s = sum(row.predicted_s for row in lined.rows)
    assert predicted_s == pytest.approx(lined.prediction.step_time_s)
    assert lined.warnings == ()


def test_all_products_of_the_program_are_planned_ones(lined):
    products = [row for row in lined.rows if row.kind in ("matmul", "attention")]
    assert all(
        row.lined_up and row.works and row.ops for row in products if "inside" not in row.what
    )
    # Queries, keys and values are one product of the forward pass (256 + 256 + 2,048 columns).
    (merged,) = [row for row in products if "; " in row.what]
    assert "256 x 2048 x 16384; 2048 x 2048 x 16384" in merged.what
    widths = [{op.what.matmuls[0].m, op.what.matmuls[0].n} for op in merged.ops]
    assert any(2560 in pair for pair in widths)


def test_nearly_all_else_is_known_by_its_function(lined):
    lost = [op for row in lined.rows if not row.lined_up for op in row.ops]
    assert [op.what.source for op in lost] == ["train.py:196 Trainer.accumulate.<locals>.loss"]
    rows = {row.what.partition(":")[0]: row for row in lined.rows if row.works}
    for name in ("norm", "rotate", "activate", "token_loss", "embed_tokens", "add"):
        assert rows[name].ops, name
    loop = [row for row in lined.rows if row.kind == "loop over layers"]
    assert len(loop) == 3  # kept activations, gradients, weights cast
    assert all(row.ops and row.works for row in (*loop, rows["optimizer"]))
