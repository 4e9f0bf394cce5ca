"""The TLS options of ``nbdqcow serve``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nbdqcow.errors import UsageError
from nbdqcow.nbd.uri import NbdUri

if TYPE_CHECKING:
    from nbdqcow.server.tls import ServerTls

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--tls",
        type=click.Choice(("off", "on", "require")),
        help="Whether clients may or must use TLS. [default: require with "
        "--tls-certificates or --tls-psk, else off]",
    ),
    click.option(
        "--tls-certificates",
        metavar="DIR",
        help="Directory with server-cert.pem, server-key.pem, ca-cert.pem and "
        "perhaps ca-crl.pem; looked at again for each client.",
    ),
    click.option(
        "--tls-psk",
        metavar="FILE",
        help="File with lines USER:HEXKEY, of pre-shared keys.",
    ),
    click.option(
        "--tls-verify-peer",
        type=click.Choice(("off", "optional", "on")),
        help="Whether clients may or must have certificates of the authority in "
        "ca-cert.pem. [default: off, but on with --tls-allow-dn]",
    ),
    click.option(
        "--tls-allow-dn",
        multiple=True,
        metavar="NAME",
        help="Let in only the client whose certificate has this subject "
        "(C=GB,O=Example,CN=laptop) or other name (DNS:laptop.example). May be "
        "given several times.",
    ),
    click.option(
        "--tls-export-allow-dn",
        multiple=True,
        nargs=2,
        metavar="EXPORT NAME",
        help="As --tls-allow-dn, for one export; with neither, all may use it.",
    ),
    click.option(
        "--tls-only",
        multiple=True,
        metavar="EXPORT",
        help="With --tls=on: hide this export from clients without TLS. May be "
        "given several times.",
    ),
)


def tls_options(command: F) -> F:
    """Give a click command the options that `take_tls` reads."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """What the command line asks for.

    Attributes:
        mode: ``off``, ``on`` or ``require``.
        certificates: directory; psk: file; one of them unless TLS is off.
        verify_peer: ``off``, ``optional`` or ``on``.
        allow: names of clients that may use all exports.
        export_allow: export, and the name of a client that may use it.
        only: exports that need TLS.
    """

    mode: str = "off"
    certificates: str | None = None
    psk: str | None = None
    verify_peer: str = "off"
    allow: Sequence[str] = ()
    export_allow: Sequence[tuple[str, str]] = ()
    only: Sequence[str] = ()

    def needs_tls(self, export: str) -> bool:
        """Whether a client must use TLS to have this export."""
        return (
            self.mode == "require"
            or export in self.only
            or bool(self._allowed_names(export))
        )

    def check_exports(self, names: Sequence[str]) -> None:
        """Raise `UsageError` for an export that there is not."""
        for name in (*self.only, *(name for name, _ in self.export_allow)):
            if name not in names:
                raise UsageError(f"there is no export named '{name}'")

    def uri(self, place: NbdUri, export: str) -> NbdUri:
        """Return what a client calls an export of the listener ``place``."""
        tls = self.needs_tls(export)
        if not tls:
            return replace(place, export=export)
        if self.psk is not None:
            place = replace(place, username="USER")
        key, value = (
            ("tls-psk-file", "FILE") if self.psk else ("tls-certificates", "DIR")
        )
        parameters = {**place.parameters, key: value}
        return replace(place, export=export, tls=True, parameters=parameters)

    def server_tls(self) -> "ServerTls | None":
        """Return what the server is made with. Raises `CredentialsError`."""
        if self.mode == "off":
            return None
        from nbdqcow.nbd.handshake import TlsMode
        from nbdqcow.server.tls import ServerTls
        from nbdqcow.tls import PskCredentials, TlsCredentials, VerifyPeer

        if self.certificates is not None:
            from nbdqcow.server.tls_openssl import X509ServerCredentials

            credentials: TlsCredentials[Any] = X509ServerCredentials(
                self.certificates, verify_peer=VerifyPeer(self.verify_peer)
            )
        else:
            assert self.psk is not None
            credentials = PskCredentials(self.psk, is_server=True)
        mode = TlsMode.ON if self.mode == "on" else TlsMode.REQUIRED
        return ServerTls(credentials, mode)

    def may_use(self, export: str) -> Callable[[bytes | None], bool]:
        """Return what says which clients may use an export."""
        names = self._allowed_names(export)
        if not names:
            return lambda certificate: True
        from nbdqcow.server.authz import AllowNames, by_certificate

        return by_certificate(AllowNames(names))

    def _allowed_names(self, export: str) -> frozenset[str]:
        own = (name for other, name in self.export_allow if other == export)
        return frozenset((*self.allow, *own))


def take_tls(options: dict[str, Any]) -> TlsSettings:
    """Take the options of `tls_options` out of ``options``.

    Raises `UsageError`.
    """
    mode, certificates, psk = (
        options.pop(name) for name in ("tls", "tls_certificates", "tls_psk")
    )
    allow, export_allow = (
        options.pop(name) for name in ("tls_allow_dn", "tls_export_allow_dn")
    )
    only, verify_peer = options.pop("tls_only"), options.pop("tls_verify_peer")
    if certificates is not None and psk is not None:
        raise UsageError("--tls-certificates and --tls-psk exclude each other")
    if certificates is None and psk is None:
        if mode in ("on", "require"):
            raise UsageError(f"--tls={mode} needs --tls-certificates or --tls-psk")
        mode = "off"
    mode = mode or "require"
    if mode == "off" and (allow or export_allow or only):
        raise UsageError("--tls-only and --tls-allow-dn need TLS")
    if certificates is None and (allow or export_allow or verify_peer):
        raise UsageError("--tls-allow-dn and --tls-verify-peer need --tls-certificates")
    if verify_peer == "off" and (allow or export_allow):
        raise UsageError("--tls-allow-dn excludes --tls-verify-peer=off")
    return TlsSettings(
        mode=mode,
        certificates=certificates,
        psk=psk,
        verify_peer=verify_peer or ("on" if allow or export_allow else "off"),
        allow=allow,
        export_allow=export_allow,
        only=only,
    )
