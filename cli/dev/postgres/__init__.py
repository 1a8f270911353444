"""A real PostgreSQL for `postrider run` and the tests. Start at server.

At most one server works on a data directory, and none outlives the process that started it. Every
PostgreSQL process inherits a lock beside the directory. If we hold that lock, PostgreSQL's own lock
files are stale, even if another process has their pid.
"""

from cli.dev.postgres.binaries import find_binaries
from cli.dev.postgres.directory import default_data_dir
from cli.dev.postgres.server import EmbeddedPostgres, embedded_postgres

__all__ = ["EmbeddedPostgres", "default_data_dir", "embedded_postgres", "find_binaries"]
