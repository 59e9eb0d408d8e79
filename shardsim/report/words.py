"""Numbers as sentences: what limits a plan, and what would change it."""

from __future__ import annotations

from collections.abc import Sequence

from shardsim.cost.predict import Prediction
from shardsim.cost.sensitivity import Sensitivity
from shardsim.cost.words import FIGURES, PARTS
from shardsim.units import show_percent, show_time

# A change of the step time smaller than this is none to a reader.
VISIBLE = 5e-4


def count_words(count: float) -> str:
    """Return a large count as people say it.

    >>> count_words(4e9), count_words(1.5e12), count_words(65536)
    ('4 billion', '1.5 trillion', '65,536')
    """
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.4g} {word}"
    return f"{count:,.0f}"


def days_words(days: float) -> str:
    """Return a training time in the unit that suits it.

    >>> days_words(0.02), days_words(12.3), days_words(2000)
    ('29 minutes', '12.3 days', '2,000 days')
    """
    if days < 1 / 24:
        return f"{days * 1440:.0f} minutes"
    if days < 2:
        return f"{days * 24:.1f} hours"
    return f"{days:.1f} days" if days < 1000 else f"{days:,.0f} days"


def limits_sentence(item: Prediction, figures: Sequence[Sensitivity]) -> str:
    """Return what limits the plan, in one sentence."""
    share = f"{100 * abs(figures[0].elasticity):.0f} %"
    return f"Limited by: {item.limited_by}; {share} of the step time goes with it."


def sensitivity_sentences(item: Prediction, figures: Sequence[Sensitivity]) -> list[str]:
    """Return one sentence per figure that matters, and one for those that do not."""
    lines = []
    idle = []
    for figure in figures:
        word = FIGURES[figure.figure]
        change = figure.step_time_s_at_110 / item.step_time_s - 1
        if abs(change) < VISIBLE:
            idle.append(word)
            continue
        more = "longer" if "latency" in word or word.startswith("start") else "more"
        way = "shorter" if change < 0 else "longer"
        lines.append(
            f"10 % {more} {word} would give a step of {show_time(figure.step_time_s_at_110)}, "
            f"{100 * abs(change):.1f} % {way}, and an MFU of {show_percent(figure.mfu_at_110)}."
        )
    if idle:
        lines.append(f"10 % more or less of these changes nothing: {', '.join(idle)}.")
    return lines


def why_lost(winner: Prediction, loser: Prediction) -> str:
    """Return why one plan is slower than another: the parts of the step that grew most.

    Two plans of the same model, machine and batch.
    """
    more = loser.step_time_s / winner.step_time_s - 1
    if abs(more) < VISIBLE:
        return "as fast"
    growth = {part: loser.time[part] - winner.time[part] for part in PARTS}
    against = {part: value for part, value in growth.items() if value * more > 0}
    reasons = []
    for part in sorted(against, key=lambda part: -abs(against[part])):
        if abs(against[part]) < 0.15 * max(map(abs, against.values())):
            continue
        sign = "+" if against[part] > 0 else "-"
        text = f"{PARTS[part]} {sign}{show_time(abs(against[part]))}"
        if part == "exposed_comm_s" and loser.collectives and against[part] > 0:
            worst = max(loser.collectives, key=lambda use: use.exposed_s)
            where = ", ".join(worst.mesh_axes) or "the host link"
            text += f" (most in the {worst.kind} over {where})"
        if part == "compute_s" and (work := loser.price.flops / winner.price.flops) > 1.01:
            text += f" (it executes {100 * (float(work) - 1):.0f} % more FLOP: {_remat(loser)})"
        reasons.append(text)
    way = "slower" if more > 0 else "faster"
    return f"{100 * abs(more):.1f} % {way}: {', '.join(reasons)}"


def _remat(item: Prediction) -> str:
    name = item.plan.remat.name
    return "nothing is recomputed" if name == "none" else f"remat {name}"
