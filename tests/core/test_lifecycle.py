"""States and outcomes have the same words in Python, the database and the protos."""

from core.lifecycle import (
    OPEN_STATES,
    DeactivationReason,
    DeliveryState,
    Outcome,
)
from core.models import Attempt, Base, FinishedDelivery, QueuedDelivery, WebhookConfig
from postrider.v1 import delivery_pb2

FINAL_STATES = frozenset(DeliveryState) - OPEN_STATES


def test_database_constraints_have_the_same_words() -> None:
    assert _words_of(QueuedDelivery, "delivery_queue_state_open") == OPEN_STATES
    assert _words_of(FinishedDelivery, "finished_deliveries_state_final") == FINAL_STATES
    assert _words_of(Attempt, "attempts_outcome_known") == set(Outcome)
    assert _words_of(WebhookConfig, "webhook_configs_deactivation_reason_known") == set(
        DeactivationReason
    )


def test_protos_have_the_same_words() -> None:
    states, outcomes = delivery_pb2.DeliveryState.keys(), delivery_pb2.Outcome.keys()

    assert set(states) == _in_proto("DELIVERY_STATE", DeliveryState)
    assert set(outcomes) == _in_proto("OUTCOME", Outcome)


def _in_proto(prefix: str, words: type[DeliveryState] | type[Outcome]) -> set[str]:
    return {f"{prefix}_{word.name}" for word in words} | {f"{prefix}_UNSPECIFIED"}


def _words_of(table: type[Base], constraint: str) -> set[str]:
    [check] = [c for c in table.__table__.constraints if c.name == constraint]  # type: ignore[attr-defined]
    return set(str(check.sqltext).split("'")[1::2])
