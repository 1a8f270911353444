"""Checks the processes of this machine, for `postrider health`.

A server is checked by grpc.health.v1 on its admin listener, which needs neither TLS nor a token.
Engines are checked by HTTP on their metrics listener.
"""

from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import Any, Literal

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.errors import ConfigurationError, Unavailable

type Process = Literal["server", "delivery"]

#: Compared with, never listened on.
_WILDCARDS = {"", "*", "0.0.0.0", "::"}  # noqa: S104 # nosec B104


class NothingListens(Unavailable):
    """No process listens at the address. Without arguments, `health` then skips the process."""


def ask(process: Process, address: str | None, question: str | None, seconds: float) -> str:
    """Return the status of a healthy process at host:port.

    For a server `question` is a service name, and empty for all. For engines it is "live" or
    "ready". Raises Unavailable if it is unhealthy or does not respond, and ConfigurationError if
    its listener is off (None) or the question is invalid.
    """
    if address is None:
        raise ConfigurationError(f"{_SETTING[process]} is off: set it, or give --address")
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal():
        raise ConfigurationError(f"{address!r} is not host:port")
    # A listener on all addresses is on loopback too.
    return _ASK[process]("127.0.0.1" if host in _WILDCARDS else host, int(port), question, seconds)


def ask_all(addresses: Mapping[Process, str | None], seconds: float) -> str:
    """Return the status of each process. Raises Unavailable if one is unhealthy, or none runs."""
    statuses, missing = [], []
    for process, address in addresses.items():
        if address is not None:
            try:
                statuses.append(ask(process, address, None, seconds))
            except NothingListens as error:
                missing.append(error.message)
    if not statuses:
        raise Unavailable("\n".join(missing) or "every listener is off", reason="NOTHING_LISTENS")
    return "\n".join(statuses)


def _ask_server(host: str, port: int, service: str | None, seconds: float) -> str:
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    request = health_pb2.HealthCheckRequest(service=service or "")
    # A proxy of the environment is for other hosts.
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(request, timeout=seconds)
        except grpc.RpcError as error:
            raise _no_response(target, service, error.code()) from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if status != "SERVING":
        raise Unavailable(
            f"the server at {target} is {status}: its database is unavailable, or it is stopping "
            "(see its log)",
            reason="NOT_SERVING",
        )
    return f"server: {status}"


def _no_response(target: str, service: str | None, code: grpc.StatusCode) -> Exception:
    if code is grpc.StatusCode.NOT_FOUND:
        return ConfigurationError(
            f"the server at {target} has no service {service!r}: use `liveness`, for one "
            "such as postrider.v1.EventService, or for none"
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return _nothing("server", target)
    return Unavailable(
        f"the server at {target} does not respond ({code.name}): it hangs, or another program "
        "uses the port",
        reason="SILENT",
    )


def _ask_engines(host: str, port: int, question: str | None, seconds: float) -> str:
    question = question or "ready"
    if question not in {"live", "ready"}:
        raise ConfigurationError(f"unknown check {question!r}: use live or ready")
    connection = HTTPConnection(host, port, timeout=seconds)
    try:
        connection.request("GET", f"/{question}")
        answer = connection.getresponse()
        text = answer.read(1000).decode(errors="replace").strip()
    except ConnectionRefusedError:
        raise _nothing("delivery", f"{host}:{port}") from None
    except (OSError, HTTPException) as error:
        raise Unavailable(
            f"the engines at {host}:{port} do not respond ({type(error).__name__}): they hang, or "
            "another program uses the port",
            reason="SILENT",
        ) from None
    finally:
        connection.close()
    if answer.status != HTTPStatus.OK:
        raise Unavailable(
            f"the engines at {host}:{port} are not {question} ({answer.status}): {text}",
            reason="NOT_SERVING",
        )
    return f"delivery: {question}"


def _nothing(process: Process, target: str) -> NothingListens:
    return NothingListens(
        f"no `postrider {process}` answers at {target} ({_SETTING[process]}): it does not run "
        "here, or is still starting",
        reason="NOTHING_LISTENS",
    )


_ASK: dict[Process, Callable[[str, int, str | None, float], str]] = {
    "server": _ask_server,
    "delivery": _ask_engines,
}
_SETTING: dict[Process, str] = {
    "server": "WEBHOOK_ADMIN_ADDRESS",
    "delivery": "WEBHOOK_DELIVERY_METRICS_ADDRESS",
}
