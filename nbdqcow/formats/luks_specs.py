"""What every command may have to know of LUKS: little, so that it loads fast."""

from nbdqcow.block.tools import OptionSpec


def cipher_options(prefix: str) -> list[OptionSpec]:
    """Return what ``create`` can be told of a LUKS header."""
    return [
        OptionSpec(f"{prefix}cipher-alg", "str", "Name of encryption cipher algorithm"),
        OptionSpec(f"{prefix}cipher-mode", "str", "Name of encryption cipher mode"),
        OptionSpec(f"{prefix}ivgen-alg", "str", "Name of IV generator algorithm"),
        OptionSpec(
            f"{prefix}ivgen-hash-alg", "str", "Name of IV generator hash algorithm"
        ),
        OptionSpec(f"{prefix}hash-alg", "str", "Name of encryption hash algorithm"),
        OptionSpec(
            f"{prefix}iter-time", "num", "Time to spend in PBKDF in milliseconds"
        ),
    ]


def key_options(prefix: str) -> list[OptionSpec]:
    """Return what ``amend`` can be told of key slots."""
    return [
        OptionSpec(
            f"{prefix}state",
            "str",
            "Select new state of affected keyslots (active/inactive)",
        ),
        OptionSpec(
            f"{prefix}keyslot", "num", "Select a single keyslot to modify explicitly"
        ),
        OptionSpec(
            f"{prefix}old-secret", "str", "Select all keyslots that match this password"
        ),
        OptionSpec(
            f"{prefix}new-secret",
            "str",
            "New secret to set in the matching keyslots. Empty string to erase",
        ),
        OptionSpec(
            f"{prefix}iter-time", "num", "Time to spend in PBKDF in milliseconds"
        ),
    ]
