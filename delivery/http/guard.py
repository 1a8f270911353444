"""Addresses that are never called: where the policy becomes an exception, and is found again."""

from ipaddress import ip_address

from core.addresses import AddressClass, AddressPolicy


class AddressRefused(Exception):  # noqa: N818 - named for what happened, as in core/errors.py
    """The receiver is at an address that is not dialled. Trying again changes nothing.

    Not an OSError: aiohttp takes those for network trouble, tries the next address and forgets why.
    The address itself is left out, since this text may reach the merchant.
    """

    def __init__(self, address_class: AddressClass):
        super().__init__(f"the address of the receiver is not a public one ({address_class})")
        self.address_class = address_class


def refuse_unless_allowed(policy: AddressPolicy, text: str) -> None:
    """Raise AddressRefused for an address that may not be dialled, or is not one at all."""
    try:
        refusal = policy.refusal(ip_address(text))
    except ValueError:
        refusal = AddressClass.RESERVED
    if refusal is not None:
        raise AddressRefused(refusal)


def refusal_of(error: BaseException) -> AddressRefused | None:
    """Find the refusal behind an error that surfaced from a request, if there is one."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, AddressRefused):
        behind = behind.__cause__ or behind.__context__
    return behind
