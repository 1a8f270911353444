"""Alembic migrations, run by `postrider migrate`. versions/ has one dated file per change."""
