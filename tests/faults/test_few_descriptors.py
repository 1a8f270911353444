"""An engine with fewer file descriptors than places keeps fewer in flight, and fails nothing."""

import pytest

from tests.scene import PATIENT, Conclude, Scene

LIMIT = 256
PLACES = 500


@pytest.mark.slow
async def test_fewer_descriptors_than_places(scene: Scene, conclude: Conclude) -> None:
    limited = ("sh", "-c", f'ulimit -n {LIMIT} && exec "$0" "$@"')
    # Every place wants a connection of its own.
    engine = await scene.engine(
        under=limited, **PATIENT, max_in_flight=PLACES, max_in_flight_per_webhook=PLACES
    )
    [told] = engine.named("fewer_in_flight")
    assert (told["wanted"], told["open_files"]) == (PLACES, LIMIT)
    scene.load.window = 2 * PLACES
    scene.load.seconds = (0.2, 0.3)
    async with scene.load.running() as load:
        await load.arrived_more(2000, timeout=60)
    await conclude(scene, f"{LIMIT} descriptors for {PLACES} places", 0)
    assert engine.lives
    assert not {a["outcome"] for a in engine.named("attempt")} & {"connection_error", "dns_error"}
