"""Turns a client certificate into a Principal, for internal services without tokens.

gRPC has already verified the certificate against the client CAs. A setting maps identities to
scopes. Only URIs (SPIFFE) and DNS names of the certificate count, and they must match exactly; the
common name (CN) is ignored.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from cryptography import x509

from server.auth.principal import Principal, Scope, canonical_identity
from server.auth.tokens import token_refused

MAX_REMEMBERED_CERTIFICATES = 1000
#: Precedes the identity in the subject, which logs, audit entries and limits use.
SUBJECT_PREFIX = "certificate:"

type AuthContext = Mapping[str, Iterable[bytes]]


class CertificateCallers:
    """Maps certificates to callers. `clock` is Unix time in seconds."""

    def __init__(
        self,
        scopes: Sequence[tuple[str, frozenset[Scope]]],
        clock: Callable[[], float] = time.time,
    ):
        self._scopes = dict(scopes)
        self._clock = clock
        self._remembered: dict[bytes, Principal] = {}

    def identify(self, peer: AuthContext) -> Principal:
        """Return the caller. Raises Unauthenticated without a certificate or a known identity."""
        certificate = next(iter(peer.get("x509_pem_cert", ())), None)
        if certificate is None:
            raise token_refused()
        caller = self._remembered.get(certificate)
        if caller is None:
            caller = self._caller(certificate, peer)
            if len(self._remembered) >= MAX_REMEMBERED_CERTIFICATES:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[certificate] = caller
        # A connection may outlive its certificate.
        if caller.expires_at <= self._clock():
            raise token_refused()
        return caller

    def _caller(self, certificate: bytes, peer: AuthContext) -> Principal:
        for identity in _identities(peer):
            scopes = self._scopes.get(identity)
            if scopes is not None:
                expires_at = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
                # Without a merchant_id it acts for the platform, within its scopes.
                return Principal(
                    SUBJECT_PREFIX + identity, None, frozenset(scopes), int(expires_at.timestamp())
                )
        raise token_refused()


def _identities(peer: AuthContext) -> list[str]:
    """Return URIs and then DNS names, in the order of the certificate."""
    names = [*peer.get("peer_uri", ()), *peer.get("peer_dns", ())]
    return [canonical_identity(name.decode("ascii", errors="replace")) for name in names]
