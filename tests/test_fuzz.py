"""Few cases of bad input over each entry; ``make fuzz`` runs many (docs/fuzzing.md)."""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
from pathlib import Path
from random import Random

import msgpack
import numpy as np
import pytest
from distributed.comm.core import CommClosedError
from fuzz import messages
from fuzz.__main__ import ENTRIES, entry, own_pool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_shm_bridge import mapping, wire

pytestmark = pytest.mark.skipif(not mapping.supported, reason="no shared pool on this platform")

# These draw whole pages, or start processes: hypothesis chooses their number only.
BY_NUMBER = {"frames": 60, "pool-files": 15}
APART = {"ledger-pages": 25}  # forks, which a process with threads had better not


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in {*BY_NUMBER, *APART}])
def test_bad_input_is_refused(name: str) -> None:
    with own_pool(), entry(name) as case:

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.randoms(use_true_random=False))
        def check(rng: Random) -> None:
            assert case(rng)

        check()


@pytest.mark.parametrize("name", BY_NUMBER)
def test_bad_input_is_refused_by_number(name: str) -> None:
    with own_pool(), entry(name) as case:

        @settings(max_examples=BY_NUMBER[name], deadline=None)
        @given(st.integers(0, 2**32))
        def check(number: int) -> None:
            assert case(Random(number))

        check()


@pytest.mark.parametrize("name", APART)
def test_the_command(name: str) -> None:
    line = [sys.executable, "-m", "tests.fuzz", "--entry", name, "--cases", str(APART[name])]
    done = subprocess.run(
        line,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"{name}: {APART[name]} cases from 0" in done.stdout


def refused(data: bytes) -> str:
    """Read what is no message; it must end the comm."""
    with own_pool(), messages._joined() as shared:
        comm = messages._Comm(shared)
        comm.stream = messages._Stream(data)
        with pytest.raises(CommClosedError) as caught:
            asyncio.run(comm.read())
        assert comm.closed()
        assert comm._connection is None
        text = str(caught.value)
        del caught
        messages._settled(shared)
        return text


def flagged(manifest: object, *frames: bytes) -> bytes:
    blob, rest = wire.pack([msgpack.packb(manifest), *frames])
    assert not rest
    return b"".join([struct.pack("<Q", sum(map(len, blob)) | 1 << 63), *blob])


@pytest.mark.parametrize("flag", [0, 1 << 63])
@pytest.mark.parametrize("nbytes", [1 << 62, (1 << 63) - 1, 1 << 50])
def test_no_memory_is_asked_for_on_a_peers_word(flag: int, nbytes: int) -> None:
    assert "announces" in refused(struct.pack("<Q", nbytes | flag) + b"x" * 100)


@pytest.mark.parametrize("nbytes", [1 << 62, 1 << 50, (1 << 64) - 1])
def test_no_memory_is_asked_for_pieces_that_can_not_come(nbytes: int) -> None:
    assert "announces" in refused(flagged([[0, 1, nbytes]], b"") + struct.pack("<QQ", 0, 10))


@pytest.mark.parametrize(
    "manifest",
    [
        [[0, 0, 77]],  # there is no such ticket
        [[0, 0, 1], [0, 1, 1]],  # twice the same place
        [[1, 0, 1]],  # not empty
        [[2, 0, 1]],  # no such frame
        [[-1, 0, 1]],
        [[0.0, 0, 1]],
        [[True, 0, 1]],
        [[0, 7, 1]],  # no such way
        [[0, 0]],
        {"a": 1},
        7,
        None,
    ],
)
def test_a_ticket_frame_that_is_none(manifest: object) -> None:
    refused(flagged(manifest, b"", b"x"))


def test_what_a_peer_says_of_its_pool_is_compared_by_type() -> None:
    with own_pool(), messages._joined() as shared:
        comm = messages._Comm(shared)
        ours = {"version": 1, "connection": comm.connection, **shared.identity()}
        for odd in (np.arange(3), True, 1.0, [1], None):
            assert not comm._agree(ours, {**ours, "version": odd})
            assert not comm._agree(ours, {**ours, "pool": odd})
            assert not comm._agree(ours, {**ours, "connection": odd})
        assert comm._agree(ours, dict(ours))
        comm.abort()
