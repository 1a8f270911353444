"""Refuses addresses that the policy forbids, and finds that refusal in aiohttp's errors."""

from ipaddress import ip_address

from core.addresses import AddressClass, AddressPolicy


class AddressRefused(Exception):  # noqa: N818 - like the errors of core/errors.py
    """The receiver's address is forbidden. A retry does not help.

    It is not an OSError, because aiohttp would try the next address and drop the reason. The text
    omits the address, because merchants may see it.
    """

    def __init__(self, address_class: AddressClass):
        super().__init__(f"the address of the receiver is not a public one ({address_class})")
        self.address_class = address_class


def refuse_unless_allowed(policy: AddressPolicy, text: str) -> None:
    """Raise AddressRefused for a forbidden or malformed address."""
    try:
        refusal = policy.refusal(ip_address(text))
    except ValueError:
        refusal = AddressClass.RESERVED
    if refusal is not None:
        raise AddressRefused(refusal)


def refusal_of(error: BaseException) -> AddressRefused | None:
    """Return the refusal that caused an error, if any."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, AddressRefused):
        cause = cause.__cause__ or cause.__context__
    return cause
