"""A certificate authority that no machine knows, and a server's certificate signed by it."""

from __future__ import annotations

import datetime as dt
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


def issue(folder: Path) -> tuple[Path, Path, Path]:
    """Writes the authority's certificate, and certificate and key of 127.0.0.1, as PEM files; returns the three."""
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    root = _certificate(issuer, issuer, authority.public_key()).add_extension(x509.BasicConstraints(True, None), True)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    leaf = _certificate(subject, issuer, server.public_key()).add_extension(address, False)
    contents = {
        "authority.pem": root.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM),
        "server.pem": leaf.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM),
        "key.pem": server.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder / "authority.pem", folder / "server.pem", folder / "key.pem"


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    day = dt.timedelta(days=1)
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)
