"""``--image-opts``: an image as a set of options (QEMU's keyval syntax)."""

from nbdqcow.errors import UsageError


def parse_keyval(text: str, *, flags: bool = True) -> dict[str, str]:
    """Return the pairs of ``key=value,...``; ``,,`` is a comma in a value.

    With ``flags`` a key without ``=`` is ``on``; the first one is ``file`` with
    that value. Raises `UsageError`.
    """
    pairs: dict[str, str] = {}
    for index, item in enumerate(text.replace(",,", "\0").split(",")):
        if not item:
            continue
        key, equals, value = item.replace("\0", ",").partition("=")
        if not (flags or equals):
            raise UsageError(f"Expected '=' after parameter '{key}'")
        if not equals and index == 0:
            pairs["file"] = key
            continue
        if not key:
            raise UsageError(f"'{text}' is not key=value,...")
        pairs[key] = value if equals else "on"
    return pairs
