"""One process with eight host devices, for all tests of a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardsim.xla import HostDevices


@pytest.fixture(scope="session")
def host() -> Iterator[HostDevices]:
    """Return eight host devices in a process of their own."""
    with HostDevices(8) as devices:
        yield devices
