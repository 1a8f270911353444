"""What an update may name."""

from collections.abc import Collection

from core.errors import InvalidArgument


def check_mask(paths: Collection[str], updatable: Collection[str]) -> None:
    """InvalidArgument unless the mask names at least one field, and only those that can change."""
    listing = ", ".join(updatable)
    if not paths:
        raise InvalidArgument.of(
            "update_mask", f"is required; name what to change of {listing}", reason="MASK_EMPTY"
        )
    if unknown := sorted(set(paths) - set(updatable)):
        raise InvalidArgument.of(
            "update_mask",
            f"cannot change {', '.join(repr(path[:64]) for path in unknown)}; only {listing}",
            reason="MASK_FIELD_UNKNOWN",
        )
