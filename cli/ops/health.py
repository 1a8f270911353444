"""`postrider health`: asks the processes of this machine how they are, for containers and people.

A server by grpc.health.v1 on its admin listener, which wants neither TLS nor a token; engines by
HTTP on their metrics listener.
"""

from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import Any, Literal

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.errors import ConfigurationError, Unavailable

type Process = Literal["server", "delivery"]

_WILDCARDS = {"", "*", "0.0.0.0", "::"}  # noqa: S104 # nosec B104 - compared with, never listened on


class NothingListens(Unavailable):
    """Nobody is at the address; without a process to ask for, that is no fault yet."""


def ask(process: Process, address: str | None, question: str | None, seconds: float) -> str:
    """What the process at host:port says when it is well.

    A server is asked for a service by name (the empty one stands for all), engines whether they are
    "live" or "ready". Unavailable when it is not well or does not answer; ConfigurationError when
    its listener is off (None) or the question makes no sense to it.
    """
    if address is None:
        raise ConfigurationError(
            f"{_SETTING[process]} is off, so there is nothing to ask: set it, or give --address"
        )
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal():
        raise ConfigurationError(f"{address!r} is no host:port to ask at")
    # Who listens everywhere listens here.
    return _ASK[process]("127.0.0.1" if host in _WILDCARDS else host, int(port), question, seconds)


def ask_all(addresses: Mapping[Process, str | None], seconds: float) -> str:
    """What each process here says; Unavailable when one is not well, or when there is none."""
    said, missing = [], []
    for process, address in addresses.items():
        if address is not None:
            try:
                said.append(ask(process, address, None, seconds))
            except NothingListens as error:
                missing.append(error.message)
    if not said:
        raise Unavailable("\n".join(missing) or "every listener is off", reason="NOTHING_LISTENS")
    return "\n".join(said)


def _ask_server(host: str, port: int, service: str | None, seconds: float) -> str:
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    request = health_pb2.HealthCheckRequest(service=service or "")
    # A proxy that the environment names is for the world outside.
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(request, timeout=seconds)
        except grpc.RpcError as error:
            raise _silence(target, service, error.code()) from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if status != "SERVING":
        raise Unavailable(
            f"the server at {target} says {status}: its database is away or it is stopping, and "
            "its log says which",
            reason="NOT_SERVING",
        )
    return f"server: {status}"


def _silence(target: str, service: str | None, code: grpc.StatusCode) -> Exception:
    if code is grpc.StatusCode.NOT_FOUND:
        return ConfigurationError(
            f"the server at {target} knows no service {service!r}: ask for `liveness`, for one "
            "such as postrider.v1.EventService, or for none"
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return _nothing("server", target)
    return Unavailable(
        f"the server at {target} does not answer ({code.name}): it hangs, or something else is "
        "there",
        reason="SILENT",
    )


def _ask_engines(host: str, port: int, question: str | None, seconds: float) -> str:
    question = question or "ready"
    if question not in {"live", "ready"}:
        raise ConfigurationError(f"engines are asked if they are live or ready, not {question!r}")
    connection = HTTPConnection(host, port, timeout=seconds)
    try:
        connection.request("GET", f"/{question}")
        answer = connection.getresponse()
        text = answer.read(1000).decode(errors="replace").strip()
    except ConnectionRefusedError:
        raise _nothing("delivery", f"{host}:{port}") from None
    except (OSError, HTTPException) as error:
        raise Unavailable(
            f"the engines at {host}:{port} do not answer ({type(error).__name__}): they hang, or "
            "something else is there",
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
        "here, or is not up yet",
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
