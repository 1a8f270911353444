"""The one policy by which both processes judge URLs and sockets, as the settings make it."""

from core.addresses import AddressPolicy
from core.config import EgressSettings
from core.urls import UrlPolicy


def url_policy(settings: EgressSettings) -> UrlPolicy:
    """The rules for webhook URLs; its `addresses` are those for every socket."""
    return UrlPolicy(
        AddressPolicy(settings.allowed_cidrs, settings.denied_cidrs),
        settings.allowed_ports,
        settings.denied_hosts,
    )
