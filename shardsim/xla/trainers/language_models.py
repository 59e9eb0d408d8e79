"""An exported plan in AXLearn or Levanter: the plan's tiny copy in their own language models."""

from __future__ import annotations

from pathlib import Path

from shardsim.emit.dialects.axlearn import axlearn_arrays, axlearn_code
from shardsim.emit.dialects.levanter import levanter_code, levanter_layout
from shardsim.emit.dialects.rules import resolve_names
from shardsim.errors import PlanError
from shardsim.plan import Plan
from shardsim.xla.trainers.libraries import ask, tiny_copy
from shardsim.xla.trainers.result import Placed, TrainerResult, spec_of

STEPS = 2

# Weight of ours -> the end of its path in AXLearn, where one may hold several (fused), in Levanter.
_PATHS = {
    "token_embedding": ("emb/token_emb/weight", "token_embeddings.weight"),
    "attention_norm_scale": ("self_attention/norm/scale", "input_layernorm.weight"),
    "query": ("i_proj/qkv_proj/weight", "q_proj.weight"),
    "key": ("i_proj/qkv_proj/weight", "k_proj.weight"),
    "value": ("i_proj/qkv_proj/weight", "v_proj.weight"),
    "attention_output": ("attention/o_proj/weight", "o_proj.weight"),
    "mlp_norm_scale": ("feed_forward/norm/scale", "post_attention_layernorm.weight"),
    "mlp_in": ("feed_forward/linear1_0/weight", "up_proj.weight"),
    "mlp_gate": ("feed_forward/linear1_1/weight", "gate_proj.weight"),
    "mlp_out": ("feed_forward/linear2/weight", "down_proj.weight"),
    "final_norm_scale": ("output_norm/scale", "transformer.norm.weight"),
    "output_head": ("lm_head/weight", "lm_head.weight"),
}


def verify_axlearn(
    plan: Plan, *, python: str | None, path: Path | None, scale: str, devices: int
) -> TrainerResult:
    """Apply the exported file to the config of AXLearn's own Llama and take steps with it."""
    plan = _llama(tiny_copy(plan, "axlearn", scale, devices), "axlearn")
    model = plan.model
    request = {
        "steps": STEPS,
        "batch": plan.batch,
        "sequence": plan.sequence,
        "vocab": model.vocab,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "tied": model.tied_embeddings,
        "model": {
            "num_layers": model.layers,
            "hidden_dim": model.embed,
            "ffn_dim": model.mlp,
            "num_heads": model.heads,
            "vocab_size": model.vocab,
        },
    }
    answer, versions = ask("axlearn", axlearn_code(plan), request, plan, python)
    rows, missing = [], []
    for name, (array, exported) in axlearn_arrays(plan).items():
        found = [spec for end, spec in answer["specs"].items() if end.endswith(_PATHS[name][0])]
        if not found:
            missing.append(name)
        # What is of the layers has their dimension first, which nothing splits.
        rank = len(array.spec)
        rows += [
            Placed(name, array.spec, spec_of(exported), spec_of(spec, answer["mesh"])[-rank:])
            for spec in found
        ]
    return TrainerResult(
        against="axlearn",
        plan=plan,
        versions=versions,
        parameters=rows,
        missing=missing,
        losses=answer["losses"],
    )


def verify_levanter(
    plan: Plan, *, python: str | None, path: Path | None, scale: str, devices: int
) -> TrainerResult:
    """Parse the exported file as Levanter's own config and train its own Llama under it."""
    plan = _llama(tiny_copy(plan, "levanter", scale, devices), "levanter")
    layout = levanter_layout(plan)
    model = plan.model
    request = {
        "steps": STEPS,
        "vocab": model.vocab,
        "model": {
            "hidden_dim": model.embed,
            "intermediate_dim": model.mlp,
            "num_layers": model.layers,
            "num_heads": model.heads,
            "num_kv_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "seq_len": plan.sequence,
            "tie_word_embeddings": str(model.tied_embeddings).lower(),
        },
    }
    code = levanter_code(plan)
    answer, versions = ask("levanter", code, request, plan, python, suffix=".yaml")
    rows, missing = [], []
    for array in layout.arrays:
        exported = resolve_names(array.names, layout.rules)
        wanted, made = (
            dict(zip(array.names, spec, strict=True)) for spec in (array.spec, map(tuple, exported))
        )
        found = {
            path: entry
            for path, entry in answer["arrays"].items()
            if path.endswith(_PATHS[array.what][1])
        }
        if not found:
            missing.append(array.what)
        for path, entry in found.items():
            axes = entry["axes"]
            rows.append(
                Placed(
                    f"{array.what} ({path})",
                    tuple(wanted.get(axis, ()) for axis in axes),
                    tuple(made.get(axis, ()) for axis in axes),
                    spec_of(entry["spec"], answer["mesh"]),
                )
            )
    return TrainerResult(
        against="levanter",
        plan=plan,
        versions=versions,
        parameters=rows,
        missing=missing,
        losses=answer["losses"],
        remarks=layout.remarks,
    )


def _llama(plan: Plan, trainer: str) -> Plan:
    """Return a plan of a model that the trainer's own Llama is."""
    model = plan.model
    if model.positions != "rotary" or model.norm != "rmsnorm" or not model.gated_mlp:
        raise PlanError(f"verify: against {trainer} with models as Llama, not {model.name}")
    return plan
