"""How long the stages of a pipeline wait for each other, beside what one that has the head does.

A stage of P runs a microbatch in f seconds forward and b back, over v chunks of layers; the last
one also runs the head, h seconds. To pass it on from chunk to chunk takes s each way, and a sender
waits for that. No stage ends before it has run its M microbatches, after the first of them has
reached it, waiting where it has to for gradients of others, and before the last has left all
others. The longest of that, of the last stage and of those between two others, is the step of 1F1B
(Narayanan et al. 2021, arXiv 2104.04473, section 2.2): (P - 1) (f + b) / v of waiting where sends
take nothing.

Where gradients of weights are turns of their own, or stages are not alike, no such formula is used:
their turns are walked in order, each as soon as the stage is free and what it needs has come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardsim.plan.layout import Number
from shardsim.program.schedule import Pipeline
from shardsim.program.turns import Turn, one_forward_one_backward, only_forward, zero_bubble


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Seconds of one microbatch on one stage."""

    forward_s: Number
    backward_s: Number
    last_s: Number  # what the last microbatch takes longer back, before it is passed on
    head_s: Number
    send_s: Number  # to another stage, once


def waiting_s(pipeline: Pipeline, turns: Turns, trained: bool) -> Number:
    """Return the seconds of a step in which the stage with the head waits for others."""
    found = _trained_s(pipeline, turns) if trained else _forward_s(pipeline, turns)
    return np.where(np.greater(pipeline.stages, 1), found, 0.0)


def _trained_s(pipeline: Pipeline, turns: Turns) -> Number:
    """With several chunks a stage has twice as much to do before the first gradient comes back."""
    stages, many, chunks = pipeline.stages, pipeline.microbatches, pipeline.chunks
    send_s, head_s = turns.send_s, turns.head_s
    there_s = turns.forward_s / chunks
    back_s = (turns.backward_s + turns.last_s) / chunks
    fill_s = (stages - 1) * (there_s + back_s)
    found = fill_s + (2 * stages - 3) * send_s
    more_s = many * (send_s - head_s)  # of a stage that sends both ways and has no head
    one_s = more_s + fill_s + 2 * head_s + (2 * stages - 5) * send_s
    several: Number = -np.inf
    for before in (1, stages - 2):  # the second stage, and the last but one
        ahead_s = (stages - 1 - before) * (back_s - there_s)
        idle_s = np.maximum(head_s - send_s + ahead_s, 0) + np.maximum(head_s - send_s - ahead_s, 0)
        way_s = before * (there_s + back_s + 2 * send_s) - send_s
        several = np.maximum(several, more_s + way_s + idle_s)
    between_s = np.where(np.equal(chunks, 1), one_s, several)
    return np.where(np.greater(stages, 2), np.maximum(found, between_s), found)


def _forward_s(pipeline: Pipeline, turns: Turns) -> Number:
    """Few microbatches come back for the next chunk when nothing is left to do meanwhile."""
    stages, many, chunks = pipeline.stages, pipeline.microbatches, pipeline.chunks
    send_s, head_s = turns.send_s, turns.head_s
    chunk_s = turns.forward_s / chunks
    own_s = many * (turns.forward_s + head_s + (chunks - 1) * send_s)
    last_s = own_s + (stages - 1) * (chunk_s + send_s)
    each_s = chunk_s + np.maximum(head_s, send_s)
    few_s = stages * turns.forward_s + (stages * chunks - 1) * send_s + head_s
    few_s = few_s + (many - 1) * each_s
    first_s = many * (turns.forward_s + chunks * send_s) + head_s
    first_s = first_s + (stages - 1) * chunk_s + (stages - 2) * send_s
    return np.maximum(np.maximum(last_s, few_s), first_s) - own_s


def in_ticks_s(pipeline: Pipeline, each_s: Number) -> Number:
    """Return the same of stages that run all microbatches in ticks which all of them run alike.

    `each_s` are those of a microbatch's layers and sends on one stage; on nothing it takes as long.
    """
    return each_s * pipeline.microbatches * pipeline.bubble


@dataclass(frozen=True, kw_only=True)
class Took:
    """Seconds of one kind of turn of a stage: until what it makes is passed on, and what it closes
    with, of all microbatches but the last, and of that one."""

    turn_s: Number = 0.0
    closing_s: Number = 0.0
    last_turn_s: Number = 0.0
    last_closing_s: Number = 0.0

    def total_s(self, many: Number) -> Number:
        """Return the seconds of `many` microbatches."""
        return (many - 1) * (self.turn_s + self.closing_s) + self.last_turn_s + self.last_closing_s

    def of(self, last: bool) -> tuple[Number, Number]:
        """Return both, of the last microbatch or of another."""
        if last:
            return self.last_turn_s, self.last_closing_s
        return self.turn_s, self.closing_s


@dataclass(frozen=True, kw_only=True)
class StageTurns:
    """What turns of one stage take, which differs from others; the head follows a way forward."""

    forward: Took
    backward: Took
    weights: Took = Took()  # gradients of weights, where they are apart
    head: Took = Took()


def walked_s(
    pipeline: Pipeline,
    each: Sequence[StageTurns],
    sends_s: Sequence[Number],
    trained: bool,
    after_s: Number = 0.0,
) -> Number:
    """Return when all stages have done their last turns, and the last one `after_s` more behind
    its own, of stages `each` as it is, from which sends to the next one (from the last one to the
    first) take `sends_s`; `pipeline` is of one size."""
    stages, many = len(each), round(float(pipeline.microbatches))
    chunks = round(float(pipeline.chunks))
    todo = [_order(pipeline, stage, stages, many, chunks, trained) for stage in range(stages)]
    free: list[Number] = [0.0] * stages
    done: dict[tuple[bool, int, int], Number] = {}  # and sent
    nexts = [0] * stages
    while any(number < len(turns) for number, turns in zip(nexts, todo, strict=True)):
        for stage, turns in enumerate(todo):
            while nexts[stage] < len(turns):
                turn = turns[nexts[stage]]
                place, way = turn.chunk * stages + stage, 1 if turn.forward else -1
                start, end = (0, stages * chunks - 1)[::way]
                first = turn.weights or place == start
                need = (turn.forward, turn.microbatch, place - way)
                if not first and need not in done:
                    break
                begin = free[stage] if first else np.maximum(free[stage], done[need])
                passed_on = not turn.weights and place != end
                took_s, closing_s = _took(each[stage], turn, many, chunks)
                across = stage if turn.forward else (stage - 1) % stages
                there = begin + took_s + (sends_s[across] if passed_on else 0.0)
                free[stage] = there + closing_s
                if not turn.weights:
                    done[turn.forward, turn.microbatch, place] = there
                nexts[stage] += 1
    latest: Number = free[-1] + after_s
    for other in free[:-1]:
        latest = np.maximum(latest, other)
    return latest


def _order(
    pipeline: Pipeline, stage: int, stages: int, many: int, chunks: int, trained: bool
) -> tuple[Turn, ...]:
    if not trained:
        return only_forward(stages, many, chunks)
    if np.any(pipeline.split_backward):
        return zero_bubble(stages, stage, many)
    return one_forward_one_backward(stages, stage, many, chunks)


def _took(stage: StageTurns, turn: Turn, many: int, chunks: int) -> tuple[Number, Number]:
    last = turn.microbatch == many - 1
    if turn.forward:
        turn_s, closing_s = stage.forward.of(last)
        head_s = sum(stage.head.of(last)) if turn.chunk == chunks - 1 else 0.0
        return turn_s / chunks + head_s, closing_s / chunks
    turn_s, closing_s = (stage.weights if turn.weights else stage.backward).of(last)
    return turn_s / chunks, closing_s / chunks
