import errno

from nbdqcow.server.failures import FailureLog

FULL = OSError(errno.ENOSPC, "the disk is full")


def test_an_error_is_told_again_after_a_minute(caplog):
    failures = FailureLog("disk.img")
    for now in (0.0, 0.1, 59.0):
        failures.note("WRITE", FULL, now)
    failures.note("READ", OSError(errno.EIO, "broken"), 59.0)
    failures.note("TRIM", FULL, 61.0)
    failures.note("TRIM", FULL, 200.0)
    assert caplog.messages == [
        "'disk.img': WRITE failed: the disk is full",
        "'disk.img': READ failed: broken",
        "'disk.img': TRIM failed: the disk is full"
        " (and 2 times since it was last told)",
        "'disk.img': TRIM failed: the disk is full",
    ]


def test_errors_without_words(caplog):
    failures = FailureLog("disk.img")
    failures.note("WRITE", MemoryError(), 0.0)
    failures.note("WRITE", OSError("odd"), 0.0)
    failures.note("WRITE", OSError("odd"), 60.0)
    assert caplog.messages == [
        "'disk.img': WRITE failed: out of memory",
        "'disk.img': WRITE failed: odd (and 1 times since it was last told)",
    ]
