"""Which line of the source an instruction comes from."""

from __future__ import annotations

import os.path

from shardsim.xla.hlo.module import Instruction, Module

STEPS = 3  # neighbours of an instruction without a source that are asked for theirs


def source_of(module: Module, item: Instruction) -> str:
    """Return the innermost place that `item` comes from: `explicit.py:67 Explicit.whole_weight`.

    Instructions that the compiler made without saying what for take their neighbours' place; empty
    where these have none either.
    """
    stack = module.frames.stack(named(module, item).stack_frame_id)
    if not stack:
        return ""
    return f"{os.path.basename(stack[0].file)}:{stack[0].line} {stack[0].function}".strip()


def named(module: Module, item: Instruction, wanted: str = "") -> Instruction:
    """Return the instruction that says where `item` comes from; `item` itself if none does.

    First `item` and what it calls. Where these have lost their names, what it reads and what reads
    it, up to `STEPS` away; with `wanted`, one whose op_name holds that word is preferred to nearer
    ones.
    """
    computation = module.homes[item]
    found: list[Instruction] = []
    level, seen = [item], {item.name}
    for step in range(STEPS + 1):
        for near in level:
            inside = module.called(near).instructions.values() if near.opcode == "fusion" else ()
            for one in (near, *reversed(list(inside))):
                if one.op_name and one.stack_frame_id:
                    if wanted in one.op_name:
                        return one
                    found.append(one)
        if found and step == 0:
            break
        around = []
        for near in level:
            around += [computation[name] for name in near.operands]
            around += computation.users[near.name]
        level = [near for near in around if near.name not in seen]
        seen.update(near.name for near in level)
    return found[0] if found else item
