import errno

import pytest

from nbdqcow.errors import BlockError, ImageError, NotSupported
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.errno_map import nbd_errno

CASES = [
    (PermissionError(errno.EPERM, ""), nbd.EPERM),
    (OSError(errno.EROFS, ""), nbd.EPERM),
    (OSError(errno.EIO, ""), nbd.EIO),
    (OSError(errno.ENOMEM, ""), nbd.ENOMEM),
    (OSError(errno.EINVAL, ""), nbd.EINVAL),
    (OSError(errno.ENOSPC, ""), nbd.ENOSPC),
    (OSError(errno.EDQUOT, ""), nbd.ENOSPC),
    (OSError(errno.EFBIG, ""), nbd.ENOSPC),
    (OSError(errno.EOVERFLOW, ""), nbd.EOVERFLOW),
    (OSError(errno.ENOTSUP, ""), nbd.ENOTSUP),
    (OSError(errno.EOPNOTSUPP, ""), nbd.ENOTSUP),
    (OSError(errno.ESHUTDOWN, ""), nbd.ESHUTDOWN),
    (OSError(errno.EACCES, ""), nbd.EIO),
    (OSError(errno.EBADF, ""), nbd.EIO),
    (OSError("no errno at all"), nbd.EIO),
    (TimeoutError(), nbd.EIO),
    (BlockError(errno.ENOSPC, "full"), nbd.ENOSPC),
    (NotSupported("slow"), nbd.ENOTSUP),
    (ImageError("corrupt"), nbd.EIO),
    (MemoryError(), nbd.ENOMEM),
    (ValueError(), nbd.EIO),
    (KeyboardInterrupt(), nbd.EIO),
]


@pytest.mark.parametrize(("exc", "expected"), CASES, ids=[repr(c[0]) for c in CASES])
def test_nbd_errno(exc, expected):
    assert nbd_errno(exc) == expected


def test_every_errno_has_an_nbd_value():
    """One of proto.md, "Error values"."""
    known = {
        *(nbd.EPERM, nbd.EIO, nbd.ENOMEM, nbd.EINVAL, nbd.ENOSPC, nbd.EOVERFLOW),
        *(nbd.ENOTSUP, nbd.ESHUTDOWN),
    }
    for number in errno.errorcode:
        assert nbd_errno(OSError(number, "")) in known
