"""Alembic migrations, run by `postrider migrate`; versions/ holds one file per change, by date."""
