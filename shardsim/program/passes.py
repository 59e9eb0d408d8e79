"""What an implementation does beyond the plan: passes over the Program that a partitioner wrote.

`partition` writes what a plan needs and nothing else. An implementation is a list of rules
(`rules.py`, `array_rules.py`, `attention_rules.py`, `end_rules.py`, `move_rules.py`). Pricing,
events and verification read the Program that comes out, so they see the same. Rules decide which
tasks there are; what a task costs is `shardsim.cost.costs`' business.

`python -m shardsim.program.passes` prints the table of docs/cost-model.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shardsim.machine import Machine
from shardsim.plan.layout import Layout, Number
from shardsim.program.array_rules import (
    fill_stacks,
    lay_copies_side_by_side,
    lay_out_gathered_weights,
    lay_out_turned_gradients,
    pass_logits_apart,
    pass_logits_where_rings_cut,
    put_turned_pieces_in_order,
    turn_short_parts,
)
from shardsim.program.attention_rules import (
    attend_in_blocks,
    attend_piece_by_piece,
    attend_to_few,
    attend_to_whole_rows,
    fetch_blocks,
    make_whole_heads,
    pad_for_kernels,
    two_backward_kernels,
    wait_for_the_last,
)
from shardsim.program.beside_weights import settle_beside_weights
from shardsim.program.end_rules import join_all_ends, join_ends, rotate_halves
from shardsim.program.gpu_rules import (
    activate_apart,
    add_up_summands,
    attend_apart,
    attend_by_cudnn,
    copy_in_and_out,
    exchange_beside_another_microbatch,
    keep_in_place,
    narrow_both_ways,
    pad_for_products_of_8_bits,
    pass_sums_apart,
    send_once_to_each_node,
)
from shardsim.program.grouped import (
    activate_groups_apart,
    multiply_groups,
    multiply_groups_as_libraries,
    share_tiles,
)
from shardsim.program.host_rules import copy_weights_out, lay_out_for_weights
from shardsim.program.move_rules import (
    all_reduce_instead_of_waiting_gathers,
    all_reduce_over_whole_slices,
    await_some_gathers,
    copy_beside_a_part,
    exchange_parts_of_embed,
    gather_for_the_others,
    gather_in_8_bits,
    gather_in_8_bits_and_turn,
    gather_keys_behind_queries,
    offload_to_sparse_cores,
    stop_for_hops,
    wait_for_gradients,
)
from shardsim.program.partitioner_rules import ring_each_product
from shardsim.program.ring_rules import (
    add_up_ring_ends,
    apply_activations_apart,
    lay_out_by_head,
    norm_by_position,
    place_ring_operands,
    place_ring_results,
    sum_biases_beside,
    turn_heads_into_rows,
)
from shardsim.program.rules import Rule, Where
from shardsim.program.sparse_cores import run_beside_sparse_cores
from shardsim.program.tasks import Program
from shardsim.program.torch_rules import (
    copy_out_of_gathers,
    copy_tokens_into_order,
    leave_sums_whole,
    merge_rounds,
    repeat_keys,
    rotate_as_complex_numbers,
)

IMPLEMENTATIONS: Mapping[str, tuple[Rule, ...]] = {
    # What the plan says, in as few passes as may be: a bound on what an implementation of it can
    # reach (but where SparseCores hide what the plan leaves to wait, a library gathers 8 bits, as
    # exported code does not, or torchtitan leaves whole what the plan cuts for rings).
    "ideal": (join_all_ends,),
    # What the exported code does under the TPU compiler.
    "emitted": (
        activate_groups_apart,
        multiply_groups,
        ring_each_product,
        lay_out_gathered_weights,
        lay_out_turned_gradients,
        place_ring_results,
        place_ring_operands,
        turn_heads_into_rows,
        add_up_ring_ends,
        stop_for_hops,
        put_turned_pieces_in_order,
        turn_short_parts,
        fill_stacks,
        apply_activations_apart,
        lay_out_by_head,
        rotate_halves,
        norm_by_position,
        sum_biases_beside,
        attend_to_few,
        attend_to_whole_rows,
        join_ends,
        make_whole_heads,
        pad_for_kernels,
        two_backward_kernels,
        wait_for_the_last,
        attend_in_blocks,
        fetch_blocks,
        attend_piece_by_piece,
        pass_logits_where_rings_cut,
        all_reduce_over_whole_slices,
        all_reduce_instead_of_waiting_gathers,
        offload_to_sparse_cores,
        gather_keys_behind_queries,
        run_beside_sparse_cores,
        wait_for_gradients,
        await_some_gathers,
        copy_beside_a_part,
    ),
    # A training library, as MaxText's compiled programs do.
    "trainer": (
        activate_groups_apart,
        multiply_groups_as_libraries,
        attend_to_whole_rows,
        wait_for_the_last,
        fetch_blocks,
        pass_logits_apart,
        lay_copies_side_by_side,
        put_turned_pieces_in_order,
        exchange_parts_of_embed,
        gather_in_8_bits,
        gather_for_the_others,
        all_reduce_over_whole_slices,
        offload_to_sparse_cores,
        wait_for_gradients,
    ),
}

# What is done otherwise on host devices: XLA's processor backend has kernels for products and
# fuses the rest as on GPUs. No library trains there.
ON_HOST: Mapping[str, tuple[Rule, ...]] = {
    "emitted": (
        share_tiles,
        pass_sums_apart,
        activate_apart,
        attend_apart,
        lay_out_for_weights,
        copy_weights_out,
        copy_in_and_out,
    ),
}

# PyTorch's libraries on GPUs: kernels fuse no more into matmuls, layers are no loop, and reductions
# stay what they are (one of another kind is the TPU compiler's choice).
_OF_LIBRARIES: tuple[Rule, ...] = (
    share_tiles,
    pass_sums_apart,
    activate_apart,
    attend_by_cudnn,
    narrow_both_ways,
    pad_for_products_of_8_bits,
    gather_in_8_bits_and_turn,
    exchange_parts_of_embed,
    send_once_to_each_node,
    keep_in_place,
)

# What is done otherwise on GPUs.
ON_GPU: Mapping[str, tuple[Rule, ...]] = {
    "ideal": (
        *IMPLEMENTATIONS["ideal"],
        gather_in_8_bits,
        exchange_parts_of_embed,
        send_once_to_each_node,
        add_up_summands,
        settle_beside_weights,
    ),
    "emitted": (
        share_tiles,
        pass_sums_apart,
        activate_apart,
        attend_apart,
        attend_by_cudnn,
        copy_in_and_out,
    ),
    "trainer": (*_OF_LIBRARIES, add_up_summands, settle_beside_weights),
    # Megatron's forward and backward passes of two microbatches at once.
    "combined-1f1b": (
        *_OF_LIBRARIES,
        add_up_summands,
        settle_beside_weights,
        exchange_beside_another_microbatch,
    ),
    # The tensors first that torchtitan's own code makes, then how they move.
    "torchtitan": (
        *_OF_LIBRARIES,
        rotate_as_complex_numbers,
        merge_rounds,
        repeat_keys,
        leave_sums_whole,
        add_up_summands,
        copy_tokens_into_order,
        copy_out_of_gathers,
    ),
}

# By kind of chip.
ELSEWHERE = {"gpu": ON_GPU, "cpu": ON_HOST}

# How a plan is done where nothing else is said: a chip's figures bound what is possible, the other
# costs hold for what the compiler makes.
USUAL: Mapping[str, str] = {"calibrated": "emitted", "compiler": "emitted", "physical": "ideal"}


def implemented(
    program: Program,
    name: str,
    machine: Machine,
    layout: Layout,
    devices: Number | None = None,
) -> Program:
    """Return what the implementation called `name` makes of a partitioned Program.

    `layout` is the one that the program was written for, a single plan or many. Of plans on several
    machines like `machine`, a slice has so many `devices`.
    """
    where = Where(machine=machine, layout=layout, devices=devices)
    blocks = program.blocks
    for rule in {**IMPLEMENTATIONS, **ELSEWHERE.get(machine.chip.kind, {})}[name]:
        blocks = tuple(rule(block, where) for block in blocks)
    return replace(program, blocks=blocks)


def table() -> str:
    """Return the rules of every implementation as a Markdown table."""
    lines = ["| implementation | rule | what it does |", "| --- | --- | --- |"]
    on_gpu = [(f"`{name}` on GPUs", rules) for name, rules in ON_GPU.items()]
    on_host = [(f"`{name}` on host devices", rules) for name, rules in ON_HOST.items()]
    for name, rules in (
        *((f"`{name}`", rules) for name, rules in IMPLEMENTATIONS.items()),
        *on_gpu,
        *on_host,
    ):
        if not rules:
            lines.append(f"| {name} | | adds nothing |")
        for rule in rules:
            words = " ".join((rule.__doc__ or "").split())
            lines.append(f"| {name} | `{rule.__name__}` | {words} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
