"""MaxText's model files: rows of them, and what is kept of all of one release."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardsim.files import read_yaml
from shardsim.xla.trainers.model_files import row_of

KEPT = read_yaml(Path(__file__).parents[2] / "docs" / "maxtext_models.yaml")
_SIZES = """
decoder_block: llama2
base_emb_dim: 96
base_mlp_dim: 192
base_num_query_heads: 4
base_num_kv_heads: 2
base_num_decoder_layers: 2
head_dim: 32
vocab_size: 256
mlp_activations: [silu, linear]
logits_via_embedding: true
"""
_COUNT = 2 * (96 * 32 * (2 * 4 + 2 * 2) + 3 * 96 * 192 + 2 * 96) + 257 * 96


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "base.yml").write_text("per_device_batch_size: 1\n")
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def test_a_file_is_read_on_a_slice_that_divides_its_sizes(models: Path) -> None:
    file = models / "small-1b.yml"
    file.write_text(_SIZES)
    row = row_of(file, _COUNT)  # 96 divides by 8 devices, not by 64 or 512
    assert (row["parameters"], row["own"], row["slice"]) == (_COUNT, _COUNT, "v5p:2x2x2")
    assert "refused" not in row
    assert "published" not in row


def test_a_file_that_cannot_be_said_is_refused_with_the_reason(models: Path) -> None:
    file = models / "other-1b.yml"
    file.write_text(_SIZES.replace("llama2", "deepseek4"))
    row = row_of(file, "ValueError: no such model")
    assert row["refused"].startswith("decoder_block: deepseek4 is not modelled: compressed")
    assert row["own_error"] == "ValueError: no such model"


def test_sizes_that_differ_from_the_published_are_named(models: Path) -> None:
    file = models / "gemma-2b.yml"
    file.write_text(
        "decoder_block: gemma\nbase_emb_dim: 2048\nbase_mlp_dim: 16384\nhead_dim: 256\n"
        "base_num_query_heads: 8\nbase_num_kv_heads: 1\nbase_num_decoder_layers: 18\n"
        "vocab_size: 256128\nmlp_activations: [gelu, linear]\nlogits_via_embedding: true\n"
    )
    row = row_of(file, 2_506_434_560)
    assert row["published"] == 2_506_172_416
    assert row["other_sizes"] == ["vocab: 256128, not 256000"]


def test_counts_are_maxtexts_own_in_all_that_was_read() -> None:
    rows = KEPT["models"]
    read = {name: row for name, row in rows.items() if "parameters" in row}
    assert len(rows) == KEPT["files"]
    assert len(read) == KEPT["read"]
    for name, row in read.items():
        if isinstance(row.get("own"), int):
            assert row["parameters"] == row["own"] or "apart" in row, name
        if "published" in row and "other_sizes" not in row:
            whole = row["published"] % 10**9 == 0  # billions, as "80 B"
            within = 1e9 if whole else 2e-3 * row["published"]
            assert abs(row["parameters"] - row["published"]) <= within, name
    counted = [row for row in read.values() if isinstance(row.get("own"), int)]
    assert len(counted) >= 60
    refused = [row["refused"] for row in rows.values() if "refused" in row]
    assert len(refused) == KEPT["refused"]
    assert not any("unknown" in reason for reason in refused)
