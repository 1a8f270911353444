"""Turns a client's certificate into a Principal, for internal services that have no tokens.

gRPC has verified the certificate against the client authorities by then; who is who is said by a
setting. Names of the subject (CN) count for nothing: only URIs (SPIFFE) and DNS names do, exactly.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from cryptography import x509

from server.auth.principal import Principal, Scope, canonical_identity
from server.auth.tokens import token_refused

MAX_REMEMBERED_CERTIFICATES = 1000
#: Before the identity, where a token would have its `sub`: in logs, audit entries and limits.
SUBJECT_PREFIX = "certificate:"

type AuthContext = Mapping[str, Iterable[bytes]]


class CertificateCallers:
    """Who a certificate stands for; `clock` is Unix time in seconds."""

    def __init__(
        self,
        scopes: Sequence[tuple[str, frozenset[Scope]]],
        clock: Callable[[], float] = time.time,
    ):
        self._scopes = dict(scopes)
        self._clock = clock
        self._remembered: dict[bytes, Principal] = {}

    def identify(self, peer: AuthContext) -> Principal:
        """Unauthenticated for a peer without a certificate, or with one that is nobody's."""
        certificate = next(iter(peer.get("x509_pem_cert", ())), None)
        if certificate is None:
            raise token_refused()
        caller = self._remembered.get(certificate)
        if caller is None:
            caller = self._caller(certificate, peer)
            if len(self._remembered) >= MAX_REMEMBERED_CERTIFICATES:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[certificate] = caller
        # It was valid at the handshake, and connections live on.
        if caller.expires_at <= self._clock():
            raise token_refused()
        return caller

    def _caller(self, certificate: bytes, peer: AuthContext) -> Principal:
        for identity in _identities(peer):
            scopes = self._scopes.get(identity)
            if scopes is not None:
                expires_at = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
                # No merchant_id: it acts for the platform, within its scopes.
                return Principal(
                    SUBJECT_PREFIX + identity, None, frozenset(scopes), int(expires_at.timestamp())
                )
        raise token_refused()


def _identities(peer: AuthContext) -> list[str]:
    """In the order in which they count: URIs, then DNS names, each as in the certificate."""
    names = [*peer.get("peer_uri", ()), *peer.get("peer_dns", ())]
    return [canonical_identity(name.decode("ascii", errors="replace")) for name in names]
