"""Validation that several services share: update masks and descriptions."""

from collections.abc import Collection

from core.errors import FieldViolation, InvalidArgument

_PATHS_SHOWN = 5
_PATH_SHOWN = 32
_DESCRIPTION_MAX = 500


def check_mask(paths: Collection[str], updatable: Collection[str]) -> None:
    """Raise InvalidArgument unless the mask names at least one field, and only updatable ones."""
    listing = ", ".join(updatable)
    if not paths:
        raise InvalidArgument.of(
            "update_mask",
            f"is empty: name at least one field to change ({listing})",
            reason="MASK_EMPTY",
        )
    if unknown := sorted(set(paths) - set(updatable)):
        # Bounded, because a status leaves out details that do not fit.
        named = ", ".join(repr(path[:_PATH_SHOWN]) for path in unknown[:_PATHS_SHOWN])
        more = len(unknown) - _PATHS_SHOWN
        others = f" and {more} more" if more > 0 else ""
        raise InvalidArgument.of(
            "update_mask",
            f"cannot change {named}{others}: name fields of {listing}",
            reason="MASK_FIELD_UNKNOWN",
        )


def description_violations(field: str, description: str) -> list[FieldViolation]:
    """Return at most one violation. A description is one line of printable text."""
    if len(description) <= _DESCRIPTION_MAX and description.isprintable():
        return []
    text = f"must be at most {_DESCRIPTION_MAX} printable characters"
    return [FieldViolation(field, text, "DESCRIPTION_INVALID")]
