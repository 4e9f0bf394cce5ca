"""What a client is told when a request fails: proto.md "Error values"."""

import errno

from nbdqcow.nbd import constants as nbd

_FROM_ERRNO = {
    errno.EPERM: nbd.EPERM,
    errno.EROFS: nbd.EPERM,
    errno.EIO: nbd.EIO,
    errno.ENOMEM: nbd.ENOMEM,
    errno.EINVAL: nbd.EINVAL,
    errno.ENOSPC: nbd.ENOSPC,
    errno.EDQUOT: nbd.ENOSPC,
    errno.EFBIG: nbd.ENOSPC,
    errno.EOVERFLOW: nbd.EOVERFLOW,
    errno.ENOTSUP: nbd.ENOTSUP,
    errno.EOPNOTSUPP: nbd.ENOTSUP,
    errno.ESHUTDOWN: nbd.ESHUTDOWN,
}


def nbd_errno(exc: BaseException) -> int:
    """Return the NBD error value for an exception that ended a request.

    Only an `OSError` says more than "it failed"; an errno that the protocol
    does not know, and any other exception, is EIO.
    """
    if isinstance(exc, OSError):
        return _FROM_ERRNO.get(exc.errno or 0, nbd.EIO)
    if isinstance(exc, MemoryError):
        return nbd.ENOMEM
    return nbd.EIO
