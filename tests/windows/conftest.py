"""What tests with a Windows Python need: `make test-windows` makes one, and asks for them."""

from __future__ import annotations

import os

import pytest

from tests.windows import build

ASKED = "SHM_BRIDGE_TEST_WINDOWS"


@pytest.fixture(autouse=True, scope="session")
def windows() -> None:
    """Skip where there is no Windows Python, or nobody asked for its tests."""
    if not os.environ.get(ASKED):
        pytest.skip("needs a Windows Python: `make test-windows` makes one and runs this")
    assert build.is_made(), "make test-windows makes a Windows Python first"
