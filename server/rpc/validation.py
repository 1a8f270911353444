"""What an update may name."""

from collections.abc import Collection

from core.errors import InvalidArgument

_PATHS_SHOWN = 5
_PATH_SHOWN = 32


def check_mask(paths: Collection[str], updatable: Collection[str]) -> None:
    """InvalidArgument unless the mask names at least one field, and only those that can change."""
    listing = ", ".join(updatable)
    if not paths:
        raise InvalidArgument.of(
            "update_mask", f"is required; name what to change of {listing}", reason="MASK_EMPTY"
        )
    if unknown := sorted(set(paths) - set(updatable)):
        # No more than a status has room for: what does not fit into its details is left out whole.
        named = ", ".join(repr(path[:_PATH_SHOWN]) for path in unknown[:_PATHS_SHOWN])
        more = len(unknown) - _PATHS_SHOWN
        others = f" and {more} more" if more > 0 else ""
        raise InvalidArgument.of(
            "update_mask",
            f"cannot change {named}{others}; only {listing}",
            reason="MASK_FIELD_UNKNOWN",
        )
