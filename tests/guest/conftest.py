"""What the tests with a guest share."""

import pytest

from tests.guest.kernel import Kernel


@pytest.fixture
def kernel() -> Kernel:
    """The kernel that a guest boots."""
    try:
        return Kernel()
    except FileNotFoundError as error:
        pytest.skip(f"{error} (tools/setup-system.sh test)")
