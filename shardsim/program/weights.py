"""The weights that a pass gathers in one go, and whose gradients it scatters: one collective for
each group of devices, so that those of experts and all others are apart."""

from __future__ import annotations

from shardsim.graph.derive import Transfer
from shardsim.graph.place import HEAD_WIDTHS, logical_axis
from shardsim.program.sizes import Sizes
from shardsim.program.tasks import Collective, Task
from shardsim.records import replace

Key = tuple[str, str]  # kind, and what is moved


class Weights:
    """Where a pass's tasks have its weights."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._places: dict[Key, dict[str, int]] = {}  # of each role, the place of its task

    def add(self, tasks: list[Task], transfer: Transfer, moved: Collective) -> None:
        """Add a weight to its group's collective in `tasks`, or `moved` as the first of a group."""
        along = next((d for d in transfer.dims if logical_axis(d, False) == "embed"), "embed")
        by_head = bool(HEAD_WIDTHS & {*transfer.dims})
        by_head &= not transfer.gradient or transfer.dims[0] == along
        odd = self._sizes.odd(along, transfer.axes)
        across = len(transfer.dims) == 2 and transfer.dims[-1] == along
        moved = replace(
            moved,
            by_head_bytes=moved.bytes * by_head,
            odd_bytes=moved.bytes * odd,
            odd_columns_bytes=moved.bytes * odd * across,
        )
        places = self._places.setdefault((moved.kind, moved.name), {})
        if moved.role not in places:
            places[moved.role] = len(tasks)
            tasks.append(moved)
            return
        before = tasks[places[moved.role]]
        assert isinstance(before, Collective)
        tasks[places[moved.role]] = replace(
            before,
            bytes=before.bytes + moved.bytes,
            messages=before.messages + 1,
            by_head_bytes=before.by_head_bytes + moved.by_head_bytes,
            odd_bytes=before.odd_bytes + moved.odd_bytes,
            odd_columns_bytes=before.odd_columns_bytes + moved.odd_columns_bytes,
        )

    def order(self, tasks: list[Task]) -> None:
        """Put groups in the order of their roles, most first, whatever asked for them first: what
        is computed again differs between plans. All but the first are named after their roles."""
        for places in self._places.values():
            found = [task for at in places.values() if isinstance(task := tasks[at], Collective)]
            found.sort(key=lambda task: (-task.role.count("+"), task.role))
            for number, (at, task) in enumerate(zip(sorted(places.values()), found, strict=True)):
                name = f"{task.name} over {task.role}" if number else task.name
                tasks[at] = replace(task, name=name)
