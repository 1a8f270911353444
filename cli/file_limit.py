"""The limit of open files: a request holds a connection, and so do those that wait to be reused."""

import resource

import structlog

from delivery.resolver import RACED_MAX

#: Standard streams, event loop, look-ups of names, a certificate that is read.
_OTHER_FILES = 32

log = structlog.get_logger()


def files_for(in_flight: int, database_connections: int) -> int:
    """How many files an engine opens at most, with so many attempts in flight."""
    return 2 * in_flight + database_connections + _OTHER_FILES


def fitting_in_flight(wanted: int, database_connections: int) -> int:
    """How many attempts can be in flight at once: `wanted`, or as many as there are files for.

    Raises the soft limit as far as it needs to and may. Half of the files are for connections that
    are idle, of which the dialler keeps no more: those of one attempt stay for the next one to the
    same receiver. Where there may be more, there is room for an outage as well, in which every
    attempt races all the addresses of its receiver.
    """
    reserved = database_connections + _OTHER_FILES
    needed = files_for(wanted, database_connections)
    ample = needed + (RACED_MAX - 1) * wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = soft
    if soft != resource.RLIM_INFINITY and soft < ample:
        allowed = ample if hard == resource.RLIM_INFINITY else min(ample, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == resource.RLIM_INFINITY or allowed >= needed:
        return wanted
    fitting = max(min(wanted, (allowed - reserved) // 2), 1)
    if fitting < wanted:
        log.warning(
            "fewer_in_flight",
            setting="WEBHOOK_MAX_IN_FLIGHT",
            wanted=wanted,
            in_flight=fitting,
            open_files=allowed,
            advice=f"let the engine open {needed} files (ulimit -n, LimitNOFILE=)",
        )
    return fitting
