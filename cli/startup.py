"""What both processes check when they start, beside the schema."""

import gc
import resource
from pathlib import Path

import asyncpg
import structlog

import migrations
from core.addresses import AddressPolicy
from core.encryption import KeyRing
from core.errors import ConfigurationError
from core.postgres.protocols import Pool
from core.settings import EgressSettings
from core.urls import UrlPolicy
from delivery.http.resolver import RACED_MAX

log = structlog.get_logger()


async def require_encryption_keys(pool: Pool, keyring: KeyRing) -> None:
    """ConfigurationError when secrets in the database need a key that the ring lacks."""
    rows = await pool.fetch(
        "SELECT secret_key_id AS key_id FROM webhook_configs WHERE deleted_at IS NULL UNION "
        "SELECT previous_secret_key_id FROM webhook_configs "
        "WHERE previous_secret_expires_at > now()"
    )
    missing = keyring.missing_keys({row["key_id"] for row in rows})
    if missing:
        raise ConfigurationError(
            f"secrets in the database are encrypted with the key {', '.join(sorted(missing))}, "
            "which is not configured: add it to WEBHOOK_ENCRYPTION_KEYS, or to its file"
        )


def warn_of_allowed_cidrs(settings: EgressSettings) -> None:
    """Say it at every start: with an allow-list, merchants may reach inside."""
    if settings.allowed_cidrs:
        log.warning(
            "private_addresses_allowed",
            setting="WEBHOOK_ALLOWED_CIDRS",
            cidrs=[str(network) for network in settings.allowed_cidrs],
        )


# Whether the database has the schema that this release needs, asked by every process at its start.
#
# The revisions are read from the names of their files, which sort in the order of the chain:
# Alembic
# and SQLAlchemy would cost an engine 20 MB for as long as it runs.


def revisions() -> list[str]:
    """What this release knows, the oldest first."""
    versions = Path(next(iter(migrations.__path__)), "versions")
    return sorted(path.stem for path in versions.glob("[0-9]*.py"))


def head() -> str:
    """The newest revision this release knows."""
    return revisions()[-1]


async def require_schema(pool: Pool) -> None:
    """ConfigurationError when the database is behind this release.

    A schema that is newer is fine: migrations are made to be safe beside the previous release.
    """
    try:
        table = await pool.fetchval("SELECT to_regclass('alembic_version')")
    except (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError):
        raise ConfigurationError(
            "a pooler stands before the database and gives each transaction another connection: "
            "use its session mode, or none (docs/operate/postgresql.md)"
        ) from None
    found = await pool.fetchval("SELECT version_num FROM alembic_version") if table else None
    if found is None or (found in revisions() and found != head()):
        raise ConfigurationError(
            f"the database schema is at {found or 'nothing'}, this release needs {head()}: "
            "run `postrider migrate` first"
        )


# The limit of open files: a request holds a connection, and so do those that wait to be reused.

#: Standard streams, event loop, look-ups of names, a certificate that is read.
_OTHER_FILES = 32


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


# What the garbage collector of a process that runs for long need not look at again and again.

#: Allocations that survive until the collector looks, and its looks at the young until it goes on
#: to older ones: cycles are few here, and what is in flight comes and goes by thousands.
_THRESHOLDS = 10_000, 20, 20


def spare_what_is_loaded() -> None:
    """Call when everything is imported, before the loop runs.

    Modules and their code stay. Where the collector walks them, the loop stands still: 60 ms for
    each full collection, under load once every few seconds.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


# The one policy by which both processes judge URLs and sockets, as the settings make it.


def url_policy(settings: EgressSettings) -> UrlPolicy:
    """The rules for webhook URLs; its `addresses` are those for every socket."""
    return UrlPolicy(
        AddressPolicy(settings.allowed_cidrs, settings.denied_cidrs),
        settings.allowed_ports,
        settings.denied_hosts,
    )
