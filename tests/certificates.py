"""Certificates for tests, in directories as QEMU and libnbd lay them out."""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@dataclass
class Certificate:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def key_pem(self, password: str | None = None) -> bytes:
        return self.key.private_bytes(
            Encoding.PEM,
            PrivateFormat.PKCS8,
            BestAvailableEncryption(password.encode()) if password else NoEncryption(),
        )


def subject(common_name: str) -> x509.Name:
    """A name whose text is ``O=Example,CN=...``."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def make(
    name: x509.Name,
    issuer: Certificate | None = None,
    *,
    is_authority: bool = False,
    alternatives: Sequence[x509.GeneralName] = (),
    usage: x509.ObjectIdentifier | None = None,
) -> Certificate:
    """A certificate that is good for a day, signed by ``issuer`` or itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    signer = issuer or Certificate(None, key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.certificate.subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_authority,
                content_commitment=False,
                key_encipherment=not is_authority,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=is_authority,
                crl_sign=is_authority,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
            critical=False,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()),
            critical=False,
        )
    )
    if alternatives:
        builder = builder.add_extension(
            x509.SubjectAlternativeName(alternatives), critical=False
        )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return Certificate(builder.sign(signer.key, hashes.SHA256()), key)


class Authority:
    """A certificate authority, and the directories that it fills."""

    def __init__(self, name: str = "authority") -> None:
        self.own = make(subject(name), is_authority=True)

    def server(self, name: str = "server") -> Certificate:
        """A certificate for this machine under its usual names."""
        return make(
            subject(name),
            self.own,
            alternatives=[x509.DNSName("localhost"), x509.DNSName("server.example")],
            usage=ExtendedKeyUsageOID.SERVER_AUTH,
        )

    def client(
        self, name: str, alternatives: Sequence[x509.GeneralName] = ()
    ) -> Certificate:
        return make(
            subject(name),
            self.own,
            alternatives=alternatives,
            usage=ExtendedKeyUsageOID.CLIENT_AUTH,
        )

    def write_server(
        self,
        directory: Path,
        certificate: Certificate | None = None,
        *,
        password: str | None = None,
    ) -> Path:
        return self._write(
            directory, "server", certificate or self.server(), password=password
        )

    def write_client(
        self, directory: Path, certificate: Certificate | None = None
    ) -> Path:
        """Without a certificate: one for a client that shows none."""
        return self._write(directory, "client", certificate)

    def revoke(self, directory: Path, *revoked: Certificate) -> None:
        """Write the list of certificates that are no good any more."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.own.certificate.subject)
            .last_update(NOW - DAY)
            .next_update(NOW + DAY)
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(
                    self.own.key.public_key()
                ),
                critical=False,
            )
        )
        for certificate in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(certificate.certificate.serial_number)
                .revocation_date(NOW - DAY / 2)
                .build()
            )
        signed = builder.sign(self.own.key, hashes.SHA256())
        replace(directory / "ca-crl.pem", signed.public_bytes(Encoding.PEM))

    def _write(
        self,
        directory: Path,
        end: str,
        certificate: Certificate | None,
        *,
        password: str | None = None,
    ) -> Path:
        directory.mkdir(exist_ok=True)
        replace(directory / "ca-cert.pem", self.own.pem)
        if certificate is not None:
            replace(directory / f"{end}-cert.pem", certificate.pem)
            replace(directory / f"{end}-key.pem", certificate.key_pem(password))
        return directory


def replace(path: Path, content: bytes) -> None:
    """Put a new file in the place of an old one."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, path)
