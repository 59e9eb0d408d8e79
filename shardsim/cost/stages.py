"""How long the stages of a pipeline wait for each other, beside what one that has the head does.

A stage of P runs a microbatch in f seconds forward and b back, over v chunks of layers; the last
one also runs the head, h seconds. To pass it on from chunk to chunk takes s each way, and a sender
waits for that. No stage ends before it has run its M microbatches, after the first of them has
reached it, waiting where it has to for gradients of others, and before the last has left all
others. The longest of that, of the last stage and of those between two others, is the step of 1F1B
(Narayanan et al. 2021, arXiv 2104.04473, section 2.2): (P - 1) (f + b) / v of waiting where sends
take nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardsim.plan.layout import Number
from shardsim.program.schedule import Pipeline


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
