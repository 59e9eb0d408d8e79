"""Planned beside compiled collectives: lined up, settled, and the same for every caller."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import hlo_samples as samples
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsim.cost import collectives as closed_forms
from shardsim.program.schedule import PARAMETER_PURPOSES
from shardsim.views.evidence import collectives as shown
from shardsim.xla.compare import REWRITES, Account, Comparison, line_up, settle
from shardsim.xla.hlo.collect import sent_bytes
from shardsim.xla.replay import replay
from shardsim.xla.trainers.result import TrainerResult, with_collectives

EXPLICIT = tuple(name for name in samples.DATA if samples.plan_of(name).execution == "explicit")
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "permute", "all-to-all")
AXES = (("data",), ("fsdp",), ("data", "fsdp"))
BYTES = st.integers(0, 10**9).map(float)
ACCOUNTS = st.builds(
    Account,
    kind=st.sampled_from(KINDS),
    mesh_axes=st.sampled_from(AXES),
    purpose=st.sampled_from(("weights", "block", "loss")),
    planned_bytes=BYTES,
    compiled_bytes=BYTES,
    planned_count=BYTES,
    compiled_count=BYTES,
)


def summed(accounts: Sequence[Account]) -> list[float]:
    """Return the sums of all figures."""
    names = ("planned_bytes", "compiled_bytes", "planned_count", "compiled_count")
    return [sum(getattr(one, name) for one in accounts) for name in names]


@given(st.lists(ACCOUNTS), st.randoms())
def test_lining_up_loses_nothing_and_keeps_keys_apart(accounts: list[Account], random: Any) -> None:
    lined_up = line_up(accounts)
    assert summed(lined_up) == summed(accounts)
    assert {one.key for one in accounts} == {one.key for one in lined_up}
    assert len({one.key for one in lined_up}) == len(lined_up)
    random.shuffle(accounts)
    assert {one.key: one for one in line_up(accounts)} == {one.key: one for one in lined_up}


@given(ACCOUNTS.map(lambda one: replace(one, purpose="")))
def test_a_row_is_read_as_it_was_written(account: Account) -> None:
    assert Account.of_data(account.to_data()) == account


PLANNED = st.dictionaries(
    st.tuples(st.sampled_from(KINDS[:2]), st.sampled_from(AXES)),
    st.tuples(st.integers(10**6, 10**9), st.sampled_from([None, *REWRITES])),
    min_size=1,
)


@given(PLANNED, st.sampled_from([0.0, 3e8]), st.sampled_from([0.0, 2e8]))
def test_every_known_rewrite_is_seen_through_and_nothing_else(
    chosen: dict[tuple[str, tuple[str, ...]], tuple[int, Any]], extra: float, left_out: float
) -> None:
    accounts = [
        Account(kind="all-to-all", mesh_axes=("data",), compiled_bytes=extra),
        Account(kind="all-to-all", mesh_axes=("fsdp",), planned_bytes=left_out),
    ]
    rewritten = 0.0
    for (kind, axes), (size, rewrite) in chosen.items():
        made, factor = kind, 1.0
        if rewrite and rewrite[0] == kind:
            _, made, factor = rewrite
            rewritten += size
        accounts += [
            Account(kind=kind, mesh_axes=axes, planned_bytes=size),
            Account(kind=made, mesh_axes=axes, compiled_bytes=size * factor),
        ]
    found = settle(line_up(accounts))
    assert sum(one.planned_bytes for one in found.renamed) == pytest.approx(rewritten)
    assert found.beyond_bytes == pytest.approx(extra)
    assert found.missing_bytes == pytest.approx(left_out)
    assert found.share == pytest.approx(1.0 - extra / found.compiled_bytes)


@given(st.lists(ACCOUNTS.map(lambda one: replace(one, purpose="")), min_size=1))
def test_settling_conserves_bytes(accounts: list[Account]) -> None:
    table = line_up(accounts)
    found = settle(table)
    factors = {(wanted, made): factor for wanted, made, factor in REWRITES}
    planned_bytes, compiled_bytes, *_ = summed(table)
    grown = sum((factors[o.planned, o.compiled] - 1) * o.planned_bytes for o in found.renamed)
    # What is below the tolerance is left out, once for each kind, axes and rewrite.
    assert compiled_bytes - planned_bytes - grown == pytest.approx(
        found.beyond_bytes - found.missing_bytes,
        abs=1e-6 * compiled_bytes * (len(table) + 12) + 1.0,
    )
    assert 0.0 <= found.share <= 1.0


@given(st.sampled_from(KINDS), st.integers(2, 4096), st.integers(1, 10**12))
def test_sent_bytes_are_those_of_the_closed_forms(kind: str, members: int, size: int) -> None:
    group: Any = SimpleNamespace(size=members, dcn=SimpleNamespace(size=1))
    wanted = float(closed_forms.sent_bytes(kind, group, float(size)))
    assert sent_bytes(kind, size, members) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", EXPLICIT)
def test_an_explicit_step_sends_what_is_planned(name: str) -> None:
    """And no more; the compiler sums some small arrays otherwise, or not at all."""
    found = settle(Comparison(samples.plan_of(name), samples.compiled(name)).table)
    assert found.share > 0.9999
    assert found.missing_bytes < 0.03 * found.compiled_bytes


@pytest.mark.parametrize("name", EXPLICIT)
@pytest.mark.parametrize("sign", [-1, 1])
def test_one_collective_less_or_more_is_found(name: str, sign: int) -> None:
    plan, program = samples.plan_of(name), samples.compiled(name)
    one = max(program.collectives, key=lambda item: item.sent_bytes * item.count)
    left = tuple(item for item in program.collectives if item is not one)
    changed = replace(program, collectives=left if sign < 0 else (*program.collectives, one))
    before, after = Comparison(plan, program), Comparison(plan, changed)
    moved: dict[Any, float] = defaultdict(float)
    for side, weight in ((before, -1), (after, 1)):
        for account in side.accounts:
            moved[account.key] += weight * account.compiled_bytes
    key = one.kind, one.mesh_axes, one.purpose
    assert moved.pop(key) == pytest.approx(sign * one.sent_bytes * one.count)
    assert set(moved.values()) == {0.0}
    assert before.differences != after.differences
    left_over, as_before = settle(after.table), settle(before.table)
    if sign < 0:
        assert left_over.missing_bytes > as_before.missing_bytes
    else:
        assert left_over.beyond_bytes > as_before.beyond_bytes


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "vit-explicit" else pytest.mark.slow)
        for name in samples.DATA
    ],
)
def test_a_trainers_row_is_the_same_program_with_nothing_left_out(name: str) -> None:
    plan, program = samples.plan_of(name), samples.compiled(name)
    by_purpose = Comparison(plan, program)
    result = TrainerResult(against="maxtext", plan=plan, versions={})
    result = with_collectives(result, samples.text_of(name), samples.mesh_of(name))
    assert not result.remarks
    rows = {(one.kind, one.mesh_axes): one for one in result.collectives}
    assert len(rows) == len(result.collectives)
    sums: dict[tuple[str, tuple[str, ...]], list[Account]] = defaultdict(list)
    for account in by_purpose.accounts:
        sums[account.kind, account.mesh_axes].append(account)
    assert sums.keys() == rows.keys()
    for key, accounts in sums.items():
        assert summed([rows[key]]) == pytest.approx(summed(accounts))
    sent = sum(item.sent_bytes * item.count for item in program.collectives)
    assert sum(one.compiled_bytes for one in rows.values()) == pytest.approx(sent)


def test_what_no_plan_covers_is_left_out_of_the_table_alone() -> None:
    name = "vit-explicit"
    found = Comparison(samples.plan_of(name), samples.compiled(name))
    left_out = [one for one in found.accounts if not found.covered(one)]
    assert {one.purpose for one in left_out} == {"optimizer"}
    assert not set(left_out) & set(found.differences)
    whole, table = summed(found.accounts), summed(found.table)
    assert whole[1] - table[1] == pytest.approx(sum(one.compiled_bytes for one in left_out))


def test_a_program_that_cannot_be_read_is_a_remark() -> None:
    plan = samples.plan_of("llama-partitioned")
    result = TrainerResult(against="maxtext", plan=plan, versions={})
    for text in ("HloModule x", None):
        (remark,) = with_collectives(result, text, {"a": 8}).remarks
        assert remark.startswith("collectives: the compiled program ")


@pytest.mark.parametrize("name", EXPLICIT)
def test_a_replay_tells_parameters_from_activations_as_predictions_do(name: str) -> None:
    """Gathered weights of the layers, the tables and the ends; all-reduces may stand for them."""
    plan, program = samples.plan_of(name), samples.compiled(name)
    sums: dict[str, float] = defaultdict(float)
    for item in program.collectives:
        moves = item.purpose in PARAMETER_PURPOSES or item.origin
        sums["parameters" if moves else "activations"] += item.sent_bytes * item.count
    for use in replay(plan.machine, plan, program).collectives:
        sums[use.purpose] -= use.bytes_per_chip
    assert all(abs(rest) < 1.0 for rest in sums.values())


def test_words_say_what_was_written_in_another_form() -> None:
    rows = [
        Account(kind="reduce-scatter", mesh_axes=("fsdp",), planned_bytes=2.0**30),
        Account(kind="all-reduce", mesh_axes=("fsdp",), compiled_bytes=2.0**31),
    ]
    _, words = shown([one.to_data() for one in rows])
    assert words == "in another form: reduce-scatter over fsdp as all-reduce (1.00 GiB planned)"
    more = Account(kind="all-to-all", mesh_axes=("data",), compiled_bytes=2.0**29)
    *_, words = shown([one.to_data() for one in (*rows, more)])
    assert words == "80.00 % of the bytes sent are planned, in some form"
