"""A key set of a fake issuer, on a clock that the test moves."""

import pytest

from server.auth.jwks import JwksKeys
from tests.support.clock import ManualClock
from tests.support.jwks import URL, FakeIssuer, make_jwk, make_jwks


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def issuer() -> FakeIssuer:
    return FakeIssuer(make_jwks(make_jwk()))


@pytest.fixture
def jwks(issuer: FakeIssuer, clock: ManualClock) -> JwksKeys:
    return JwksKeys(URL, issuer, clock)
