"""The operators' listener: health, reflection and channelz without tokens, so on loopback only.

It does not serve the API. Reflection describes the API for tools that connect here.
"""

from collections.abc import Sequence
from ipaddress import ip_address

import grpc
import structlog
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from core.errors import ConfigurationError
from server.settings import ServerSettings

log = structlog.get_logger()

_HEALTH = "grpc.health.v1.Health"
_CHANNELZ = "grpc.channelz.v1.Channelz"


class AdminListener:
    """Listens on WEBHOOK_ADMIN_ADDRESS. `port` is 0 if it does not listen."""

    def __init__(
        self,
        settings: ServerSettings,
        health: health_pb2_grpc.HealthServicer,
        described: Sequence[str],
    ):
        self._settings = settings
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=100, options=[("grpc.so_reuseport", 0)]
        )
        health_pb2_grpc.add_HealthServicer_to_server(health, self._server)
        channelz.add_channelz_servicer(self._server)
        reflection.enable_server_reflection(
            (*described, _HEALTH, _CHANNELZ, reflection.SERVICE_NAME), self._server
        )
        self.port = 0

    async def start(self) -> None:
        """Listen, unless it is off. Raises ConfigurationError if a configured address is taken."""
        address = self._settings.admin_address
        if address is None:
            return
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            self._refuse_or_do_without(address)
            return
        if not is_loopback(address):
            log.warning("admin_listener_exposed", setting="WEBHOOK_ADMIN_ADDRESS", address=address)
        await self._server.start()
        log.info("admin_listening", address=address, port=self.port)

    async def stop(self) -> None:
        """Stop at once, because probes and tools retry."""
        await self._server.stop(0)

    def _refuse_or_do_without(self, address: str) -> None:
        # A second server on one machine finds the default address taken, and serves without it.
        if "admin_address" in self._settings.model_fields_set:
            raise ConfigurationError(
                f"cannot listen on {address}: stop what uses it, set WEBHOOK_ADMIN_ADDRESS to "
                "another address, or to `off`"
            )
        log.warning(
            "admin_listener_off",
            address=address,
            message="the address is taken; set WEBHOOK_ADMIN_ADDRESS to another one",
        )


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach a gRPC listening address."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
