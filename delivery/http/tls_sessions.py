"""TLS sessions that are resumed: no certificate to send and check again, and with 1.2 a turn less.

A session is used once and kept again only after an answer. Until that has come its host counts as
one that resumes none, so a receiver that chokes on sessions costs a few attempts an hour and not
every other one. A resumed handshake shows no certificate, so it counts from when one was verified.
"""

import ssl
import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import NamedTuple

#: How long a certificate that was verified may stand for the ones not shown since.
_VERIFIED_SECONDS_MAX = 3600.0
#: A session holds the certificates that were shown, so it is worth some 10 KB.
_HOSTS_MAX = 1000
_PER_HOST_MAX = 4
#: Before 3.12.8 and 3.13.1 CPython loses a copy of the session, 6.5 KB and more, each time that one
#: is read (gh-116810): there are so many reads to a process then.
_READ_LOSES_MEMORY = sys.version_info < (3, 12, 8) or (3, 13) <= sys.version_info < (3, 13, 1)
_READS_MAX = 1000 if _READ_LOSES_MEMORY else inf


class _Kept(NamedTuple):
    session: ssl.SSLSession
    verified_at: float


class TlsSessions:
    """Sessions by the host whose certificate was verified; the least recently used go first."""

    def __init__(self, reads_max: float = _READS_MAX) -> None:
        self._reads_left = reads_max
        self._kept: OrderedDict[str, deque[_Kept]] = OrderedDict()
        # When a host did not take up what it was offered; or until it answers, when it was offered.
        self._declined: OrderedDict[str, float] = OrderedDict()

    def take(self, host: str) -> _Kept | None:
        """The newest session of this host that is not too old."""
        kept = self._kept.get(host)
        while kept:
            newest = kept.pop()
            if monotonic() - newest.verified_at <= _VERIFIED_SECONDS_MAX:
                # Nothing tells of a handshake that broke.
                self._doubt(host)
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
        """It did not resume: for an hour none of its sessions is wanted."""
        self._kept.pop(host, None)
        self._doubt(host)

    def read(self, host: str, tls: ssl.SSLObject) -> None:
        """Keep the session of a full handshake, where it is worth its price."""
        if self._are_wanted(host) and (session := tls.session) is not None:
            self._reads_left -= 1
            self.keep(host, session, monotonic())

    def _are_wanted(self, host: str) -> bool:
        if len(self._kept.get(host, ())) >= _PER_HOST_MAX or self._reads_left <= 0:
            return False
        declined_at = self._declined.get(host)
        return declined_at is None or monotonic() - declined_at > _VERIFIED_SECONDS_MAX

    def _doubt(self, host: str) -> None:
        self._declined[host] = monotonic()
        self._declined.move_to_end(host)
        if len(self._declined) > _HOSTS_MAX:
            self._declined.popitem(last=False)


class ResumingTls(ssl.SSLObject):
    """The TLS of one connection, which resumes a session of its host if there is one."""

    #: Of the context; a class of its own for each.
    sessions: TlsSessions
    begins: Callable[[], None]
    _resumed: _Kept | None = None
    _began = False

    def do_handshake(self) -> None:
        # Called again each time that more has arrived.
        if not self._began:
            self._began = True
            self.begins()
            self._resumed = self.sessions.take(self.server_hostname or "")
            if self._resumed is not None:
                self.session = self._resumed.session
        super().do_handshake()

    def keep_session(self) -> None:
        """After an answer: with TLS 1.3 a session comes with it, not with the handshake.

        One that was resumed goes back as it is, without being read again.
        """
        host = self.server_hostname or ""
        if self._resumed is None:
            self.sessions.read(host, self)
        elif self.session_reused:
            self.sessions.keep(host, *self._resumed)
        else:
            self.sessions.decline(host)


def resume_sessions(context: ssl.SSLContext, begins: Callable[[], None]) -> None:
    """Let the connections that are made with `context` resume each other's sessions.

    `begins` is called as each handshake begins.
    """
    own = {"sessions": TlsSessions(), "begins": staticmethod(begins), "__slots__": ()}
    context.sslobject_class = type("ResumingTls", (ResumingTls,), own)
