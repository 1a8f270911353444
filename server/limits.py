"""What one connection may cost the main listener, as options of gRPC.

Connections are closed after a while, so that clients find new servers, and streams cannot live for
ever: what was not acknowledged on one is sent again. Pings are answered, but not in a flood.
"""

from server.config import ServerSettings

type Option = tuple[str, int]


def channel_options(settings: ServerSettings) -> list[Option]:
    """Options of `grpc.aio.server` for the main listener."""
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_concurrent_streams", settings.max_streams_per_connection),
        # gRPC spreads the age by a tenth, so that connections do not all come back at once.
        ("grpc.max_connection_age_ms", _ms(settings.max_connection_age_seconds)),
        ("grpc.max_connection_age_grace_ms", _ms(settings.max_connection_grace_seconds)),
        ("grpc.max_connection_idle_ms", _ms(settings.max_connection_idle_seconds)),
        # Finds peers that vanished without a word, whose streams would else be held for hours.
        ("grpc.keepalive_time_ms", _ms(settings.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", _ms(settings.keepalive_timeout_seconds)),
        # The longer of the two counts, and this one is a minute by default.
        ("grpc.http2.ping_timeout_ms", _ms(settings.keepalive_timeout_seconds)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(settings.min_ping_interval_seconds)),
        ("grpc.http2.max_ping_strikes", settings.max_ping_strikes),
        # Without it a client that keeps an idle connection may ping once in two hours only.
        ("grpc.keepalive_permit_without_calls", 1),
        # Two servers on one port would share its calls without anybody noticing.
        ("grpc.so_reuseport", 0),
        # A token in the metadata may have 4 KiB; the default refuses at random above 8.
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.absolute_max_metadata_size", 32 * 1024),
        ("grpc.enable_channelz", int(settings.admin_address is not None)),
    ]


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
