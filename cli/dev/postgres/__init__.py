"""A real PostgreSQL for one machine: what `postrider run` and the tests use without a database URL.

Invariant: at most one server works on a data directory, and none outlives the process that started
it. A lock beside the directory, inherited by every PostgreSQL process, tells whether one is left;
once we hold it, any lock file of PostgreSQL's own is stale, whatever pid it names.
"""

from cli.dev.postgres.binaries import find_binaries
from cli.dev.postgres.directory import default_data_dir
from cli.dev.postgres.server import EmbeddedPostgres, embedded_postgres

__all__ = ["EmbeddedPostgres", "default_data_dir", "embedded_postgres", "find_binaries"]
