import logging

import pytest


@pytest.fixture(autouse=True)
def no_bug(caplog, request):
    """Fail a test in which a request ended in an unexpected exception."""
    yield
    if "bug" in request.node.name:
        return
    records = [
        record
        for when in ("setup", "call", "teardown")
        for record in caplog.get_records(when)
    ]
    bugs = [r.getMessage() for r in records if r.levelno >= logging.ERROR]
    assert not bugs
