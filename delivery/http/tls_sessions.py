"""Resumes TLS sessions, so that a new connection to a known host skips the certificates.

docs/decisions/tls-sessions.md has the figures. A session is used once, and kept again only after a
response. Until then its host counts as one that does not resume, so a receiver that fails on
sessions costs a few attempts per hour instead of every second one. A resumed handshake shows no
certificate, so a session expires an hour after the certificate was verified.
"""

import ssl
import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import NamedTuple

#: How long a verified certificate counts for resumed handshakes, which show none.
_VERIFIED_SECONDS_MAX = 3600.0
#: A session holds the certificates of its host, about 10 KB.
_HOSTS_MAX = 1000
_PER_HOST_MAX = 4
#: CPython before 3.12.8 and 3.13.1 leaks at least 6.5 KB each time that it reads a session
#: (gh-116810), so the reads of a process are limited there.
_READ_LOSES_MEMORY = sys.version_info < (3, 12, 8) or (3, 13) <= sys.version_info < (3, 13, 1)
_READS_MAX = 1000 if _READ_LOSES_MEMORY else inf


class _Kept(NamedTuple):
    session: ssl.SSLSession
    verified_at: float


class TlsSessions:
    """Sessions by the host whose certificate was verified. The least recently used are dropped."""

    def __init__(self, reads_max: float = _READS_MAX) -> None:
        self._reads_left = reads_max
        self._kept: OrderedDict[str, deque[_Kept]] = OrderedDict()
        # When a host declined a session. Until it responds, when a session was offered to it.
        self._declined: OrderedDict[str, float] = OrderedDict()

    def take(self, host: str) -> _Kept | None:
        """Return the newest session of this host that has not expired, and forget it."""
        kept = self._kept.get(host)
        while kept:
            newest = kept.pop()
            if monotonic() - newest.verified_at <= _VERIFIED_SECONDS_MAX:
                # A handshake that breaks is not reported, so the host is suspect from here on.
                self._suspect(host)
                return newest
        self._kept.pop(host, None)
        return None

    def keep(self, host: str, session: ssl.SSLSession, verified_at: float) -> None:
        self._declined.pop(host, None)
        self._kept.setdefault(host, deque(maxlen=_PER_HOST_MAX)).append(_Kept(session, verified_at))
        self._kept.move_to_end(host)
        if len(self._kept) > _HOSTS_MAX:
            self._kept.popitem(last=False)

    def decline(self, host: str) -> None:
        """Note that the host did not resume. Its sessions are not kept for an hour."""
        self._kept.pop(host, None)
        self._suspect(host)

    def read(self, host: str, tls: ssl.SSLObject) -> None:
        """Keep the session of a full handshake, unless the host has enough or does not resume."""
        if self._are_wanted(host) and (session := tls.session) is not None:
            self._reads_left -= 1
            self.keep(host, session, monotonic())

    def _are_wanted(self, host: str) -> bool:
        if len(self._kept.get(host, ())) >= _PER_HOST_MAX or self._reads_left <= 0:
            return False
        declined_at = self._declined.get(host)
        return declined_at is None or monotonic() - declined_at > _VERIFIED_SECONDS_MAX

    def _suspect(self, host: str) -> None:
        self._declined[host] = monotonic()
        self._declined.move_to_end(host)
        if len(self._declined) > _HOSTS_MAX:
            self._declined.popitem(last=False)


class ResumingTls(ssl.SSLObject):
    """The TLS of one connection. Resumes a session of its host if there is one."""

    #: Shared by the connections of one context.
    sessions: TlsSessions
    on_start: Callable[[], None]
    _resumed: _Kept | None = None
    _started = False

    def do_handshake(self) -> None:
        # Called once for each piece of the handshake that arrives.
        if not self._started:
            self._started = True
            self.on_start()
            self._resumed = self.sessions.take(self.server_hostname or "")
            if self._resumed is not None:
                self.session = self._resumed.session
        super().do_handshake()

    def keep_session(self) -> None:
        """Keep the session. Call it after a response, because TLS 1.3 sends sessions that late.

        A resumed session is kept as it was, without another read.
        """
        host = self.server_hostname or ""
        if self._resumed is None:
            self.sessions.read(host, self)
        elif self.session_reused:
            self.sessions.keep(host, *self._resumed)
        else:
            self.sessions.decline(host)


def resume_sessions(context: ssl.SSLContext, on_start: Callable[[], None]) -> None:
    """Let connections of `context` resume each other's sessions. `on_start` runs at each start."""
    shared = {"sessions": TlsSessions(), "on_start": staticmethod(on_start), "__slots__": ()}
    context.sslobject_class = type("ResumingTls", (ResumingTls,), shared)
