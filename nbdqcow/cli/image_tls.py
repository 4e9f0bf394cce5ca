"""``tls-creds=ID`` among an image's options: the object of that id, in the URI."""

from typing import Final

from nbdqcow.cli.objects import Objects
from nbdqcow.errors import ImageError, UsageError

_PARAMETER: Final = "tls-creds"


def with_credentials(filename: str, objects: Objects) -> str:
    """Return an image's name with the certificates that it says by an object's id.

    Other names come back as they are. Raises `ImageError`, and
    `CredentialsError` for credentials that a URI can't say.
    """
    if not filename.startswith("nbds") or f"{_PARAMETER}=" not in filename:
        return filename
    from urllib.parse import quote, unquote

    place, _, query = filename.partition("?")
    given = dict(item.partition("=")[::2] for item in query.split("&"))
    name = unquote(given.pop(_PARAMETER, ""))
    try:
        found = objects.credentials(name, is_server=False).as_parameters()
    except UsageError as exc:
        raise ImageError(str(exc).removeprefix("Failed to get TLS creds: ")) from None
    if (username := found.pop("username", None)) is not None:
        place = place.replace("://", f"://{quote(username, safe='')}@", 1)
    elif (
        found.get("tls-verify-peer") == "1"
        and place.startswith("nbds+unix:")
        and not given.get("tls-hostname")
    ):
        # As QEMU: any server that the authority has signed could be the one.
        raise ImageError("No hostname for certificate validation")
    given |= {key: quote(value, safe="/:") for key, value in found.items()}
    return f"{place}?{'&'.join(f'{key}={value}' for key, value in given.items())}"
