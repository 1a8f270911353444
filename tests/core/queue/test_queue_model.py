"""The queue against a model, with random operations in random order.

After each operation the whole database is compared with the model. A free choice of a statement,
for example the rows of a claim, is checked against its rule and copied to the model. Random
numbers do not depend on the database, because it returns equal rows in any order. A run therefore
draws the same numbers every time.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core import queue
from core.lifecycle import OPEN_STATES, DeliveryState, Outcome
from core.queue import BreakerChange, Chain, LeasedDelivery, Settlement
from delivery.maintain import promote_stranded
from tests.support.factories import (
    attempts,
    failed,
    health,
    make_event,
    make_webhook_config,
    places,
    rescheduled,
    settlement,
)

LIMIT = 2
READY, PARKED, LEASED = DeliveryState.READY, DeliveryState.PARKED, DeliveryState.LEASED
BLOCKED = DeliveryState.BLOCKED
DELIVERED, FAILED = DeliveryState.DELIVERED, DeliveryState.FAILED
CANCELLED = DeliveryState.CANCELLED
#: The states that may follow each state.
TRANSITIONS: dict[DeliveryState, set[DeliveryState]] = {
    READY: {LEASED, PARKED, CANCELLED},
    PARKED: {READY, CANCELLED},
    LEASED: {READY, PARKED, DELIVERED, FAILED, CANCELLED},
    BLOCKED: {READY, PARKED, CANCELLED},
    DELIVERED: set(),
    FAILED: set(),
    CANCELLED: set(),
}

_TABLES = (
    "webhook_configs",
    "events",
    "idempotency_keys",
    "delivery_queue",
    "finished_deliveries",
    "attempts",
)
_IS_DUE = "SELECT id FROM delivery_queue WHERE due_at <= now()"

_BREAKER = """
SELECT CASE WHEN breaker_open_until IS NULL THEN 'closed'
    WHEN breaker_open_until > now() THEN 'open' ELSE 'half-open' END, breaker_trips
FROM webhook_configs WHERE id = $1
"""

RESULTS: dict[str, Callable[[LeasedDelivery], Settlement]] = {
    "delivered": settlement,
    "failed": failed,
    "gone": lambda delivery: failed(delivery, status_code=410),
    "broken": lambda delivery: failed(delivery, outcome=Outcome.INTERNAL_ERROR),
    "retried at once": lambda delivery: rescheduled(delivery, seconds=0),
    "retried later": lambda delivery: rescheduled(delivery, seconds=3600),
}
INDEX = st.integers(0, 9)
RESULT_NAME = st.sampled_from(sorted(RESULTS))


@dataclass
class Config:
    active: bool = True
    reason: str | None = None
    deleted: bool = False
    failures: int = 0
    ordered: bool = False
    #: The breaker: closed, open or half-open.
    breaker: str = "closed"
    trips: int = 0
    #: The breaker is open only because the receiver requested a pause.
    briefly: bool = False


@dataclass
class Delivery:
    webhook_id: UUID
    state: DeliveryState
    attempt_count: int = 0
    lease_id: UUID | None = None
    #: The chain. Deliveries are kept in the order of their acceptance.
    chain: Chain | None = None
    seen: DeliveryState | None = field(default=None, compare=False)


class Borrowed:
    """Passes the connection to functions that need a pool."""

    def __init__(self, connection: Any):
        self.connection = connection

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Any]:
        yield self.connection

    async def fetch(self, *arguments: Any) -> Any:
        return await self.connection.fetch(*arguments)


class QueueMachine(RuleBasedStateMachine):
    """Runs all operations on one connection, one after the other."""

    def __init__(self, runner: asyncio.Runner, connection: Any):
        super().__init__()
        self.runner = runner
        self.connection = connection
        self.configs: dict[UUID, Config] = {}
        self.deliveries: dict[UUID, Delivery] = {}
        self.keys: set[str] = set()
        self.event_count = 0
        #: All leases, including lost ones, so that late settles can be tried.
        self.leases: list[LeasedDelivery] = []
        self.run(self.connection.execute(";".join(f"DELETE FROM {t}" for t in _TABLES)))  # noqa: S608

    def run[T](self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def update_config(self, webhook_id: UUID, change: str) -> None:
        statement = f"UPDATE webhook_configs SET {change} WHERE id = $1"  # noqa: S608
        self.run(self.connection.execute(statement, webhook_id))

    def ids(self, query: str) -> set[UUID]:
        return {row["id"] for row in self.run(self.connection.fetch(query))}

    # --- configs

    @initialize()
    def begin_in_the_middle(self) -> None:
        """Create data for all rules, because a run may disable the rules that create it."""
        self.create_config()
        self.create_config()
        self.change_order(0, ordered=True)
        self.enqueue([None, None, "a", None, "b", None])
        self.states_follow_the_lifecycle()
        self.claim(5)

    @precondition(lambda self: len(self.living()) < 2)
    @rule()
    def create_config(self) -> None:
        webhook_id = self.run(make_webhook_config(self.connection))
        self.configs[webhook_id] = Config()

    @rule(index=INDEX)
    def pause(self, index: int) -> None:
        webhook_id = self.pick_config(index)
        config = self.configs[webhook_id]
        if not config.active:
            return
        config.active, config.reason = False, "paused"
        self.update_config(webhook_id, "active = false, deactivation_reason = 'paused'")
        self.run(queue.park_webhooks(self.connection, [webhook_id]))
        self.park_ready(webhook_id)

    @rule(index=INDEX, ordered=st.booleans())
    def change_order(self, index: int, ordered: bool) -> None:
        """Queued deliveries do not change."""
        webhook_id = self.pick_config(index)
        self.configs[webhook_id].ordered = ordered
        self.update_config(webhook_id, f"ordered = {ordered}")

    @rule(index=INDEX)
    def reactivate(self, index: int) -> None:
        webhook_id = self.pick_config(index)
        config = self.configs[webhook_id]
        config.active, config.reason, config.failures = True, None, 0
        self.update_config(
            webhook_id, "active = true, deactivation_reason = NULL, consecutive_failures = 0"
        )

    @rule(index=INDEX, late=st.booleans(), asked=st.booleans())
    def open_breaker(self, index: int, late: bool, asked: bool) -> None:
        webhook_id = self.pick_config(index)
        config = self.configs[webhook_id]
        seen = self.run(
            self.connection.fetchval(
                "SELECT breaker_open_until FROM webhook_configs WHERE id = $1", webhook_id
            )
        )
        if late:
            seen = datetime(2000, 1, 1, tzinfo=UTC)
        # The requested pause is shorter than the rest of an open breaker's pause.
        change = BreakerChange(
            webhook_id, seen, trips=True, requested_pause_seconds=100.0 if asked else 0
        )
        due = self.ids(_IS_DUE)
        opened = self.run(queue.open_breakers(self.connection, [change], 3600, 3600))
        if late and (not asked or (config.breaker == "open" and not config.briefly)):
            assert opened == {}
            return
        assert opened == {webhook_id: 100.0 if late else 3600.0}
        config.breaker, config.briefly = "open", late
        config.trips += not late
        for delivery_id, delivery in self.deliveries.items():
            if delivery.webhook_id == webhook_id and delivery.state is READY and delivery_id in due:
                delivery.state = PARKED

    @rule(index=INDEX)
    def cool_down(self, index: int) -> None:
        webhook_id = self.pick_config(index)
        config = self.configs[webhook_id]
        if config.breaker == "open":
            config.breaker = "half-open"
            self.update_config(webhook_id, "breaker_open_until = now()")

    @rule(index=INDEX)
    def close_breaker(self, index: int) -> None:
        webhook_id = self.pick_config(index)
        config = self.configs[webhook_id]
        closed = self.run(queue.close_breakers(self.connection, [webhook_id]))
        assert closed == ({webhook_id} if config.breaker != "closed" else set())
        config.breaker, config.trips = "closed", 0

    @precondition(lambda self: len(self.living()) > 1 and len(self.configs) < 4)
    @rule(index=INDEX)
    def delete(self, index: int) -> None:
        webhook_id = self.pick_config(index)
        self.configs[webhook_id].deleted = True
        self.update_config(webhook_id, "deleted_at = now()")
        cancelled = self.run(queue.cancel_webhook(self.connection, webhook_id))
        open_deliveries = [
            d
            for d in self.deliveries.values()
            if d.webhook_id == webhook_id and d.state in OPEN_STATES
        ]
        assert cancelled == len(open_deliveries)
        for delivery in open_deliveries:
            delivery.state, delivery.lease_id = DeliveryState.CANCELLED, None

    # --- enqueue

    @precondition(lambda self: self.event_count < 30)
    @rule(
        keys=st.lists(st.sampled_from([None, None, "a", "b", "c", "d"]), min_size=1, max_size=4),
        ordering_keys=st.lists(st.sampled_from([None, "x", "x", "y"]), min_size=4, max_size=4),
    )
    def enqueue(
        self, keys: list[str | None], ordering_keys: Sequence[str | None] = (None,) * 6
    ) -> None:
        events = [
            make_event(idempotency_key=key, ordering_key=ordering_key)
            for key, ordering_key in zip(keys, ordering_keys, strict=False)
        ]
        if any(event.ordering_key for event in events):
            accepted = self.run(queue.enqueue_in_order(Borrowed(self.connection), events))  # type: ignore[arg-type]
        else:
            accepted = self.run(queue.enqueue(self.connection, events))
        wanted = {w: c for w, c in self.configs.items() if not c.deleted}
        expected = []
        for event, count in zip(events, accepted.delivery_counts, strict=True):
            if event.idempotency_key is None or event.idempotency_key not in self.keys:
                expected.append(event.id)
                self.keys |= {event.idempotency_key} - {None}  # type: ignore[arg-type]
                assert count == len(wanted)
            else:
                assert count is None
        self.event_count += len(expected)
        rows = self.run(
            self.connection.fetch(
                "SELECT id, webhook_id, event_id FROM delivery_queue WHERE event_id = ANY ($1)",
                expected,
            )
        )
        assert Counter((r["event_id"], r["webhook_id"]) for r in rows) == Counter(
            (event_id, webhook_id) for event_id in expected for webhook_id in wanted
        )
        waiting = self.backlogs()
        position = {event.id: n for n, event in enumerate(events)}
        stranded = set()
        for row in sorted(rows, key=lambda row: position[row["event_id"]]):
            config = wanted[row["webhook_id"]]
            at_once = config.active and config.breaker == "closed"
            state = READY if at_once and row["webhook_id"] not in waiting else PARKED
            made = Delivery(row["webhook_id"], state)
            ordering_key = events[position[row["event_id"]]].ordering_key
            if ordering_key and config.ordered:
                made.chain = Chain(row["webhook_id"], ordering_key)
                if self.first_of(made.chain):
                    made.state = BLOCKED
                    stranded.add(made.chain)
            self.deliveries[row["id"]] = made
        self.promote_first(stranded)

    # --- leases

    @rule(limit=st.integers(1, 5))
    def claim(self, limit: int) -> None:
        claimed, due = self.run(self.claim_beside_a_reading(limit))
        ready = {i for i in due if self.deliveries[i].state is READY}
        assert len(claimed) == min(limit, len(ready))
        for lease in claimed:
            delivery, config = self.deliveries[lease.id], self.configs[lease.webhook_id]
            assert lease.id in ready
            assert lease.attempt_count == delivery.attempt_count
            assert (lease.webhook_active, lease.webhook_deleted) == (config.active, config.deleted)
            assert lease.breaker_is_open == (config.breaker == "open")
            assert lease.is_probe == (config.breaker == "half-open")
            assert lease.has_backlog == (lease.webhook_id in self.backlogs())
            delivery.state, delivery.lease_id = LEASED, lease.lease_id
            self.leases.append(lease)

    async def claim_beside_a_reading(self, limit: int) -> tuple[list[LeasedDelivery], set[UUID]]:
        async with self.connection.transaction():
            due = {row["id"] for row in await self.connection.fetch(_IS_DUE)}
            return await queue.claim(self.connection, limit, 3600), due

    @rule(
        results=st.dictionaries(INDEX, RESULT_NAME, min_size=1, max_size=6), crashes=st.booleans()
    )
    def settle(self, results: dict[int, str], crashes: bool) -> None:
        """Settle leases of any age in any order. Only leases that are still held have an effect.

        An engine that crashes after the commit does not promote the next in a chain.
        """
        chosen = {self.pick_lease(index): name for index, name in results.items()}
        self.settle_leases(list(chosen), list(chosen.values()), crashes=crashes)

    @rule(names=st.lists(RESULT_NAME, min_size=1, max_size=3))
    def attempt(self, names: list[str]) -> None:
        """Wait until deliveries are due, claim some and settle all of them."""
        given_before = len(self.leases)
        self.let_time_pass()
        self.claim(len(names))
        self.states_follow_the_lifecycle()
        self.settle_leases(self.leases[given_before:], names)

    def settle_leases(
        self, leases: list[LeasedDelivery], names: list[str], *, crashes: bool = False
    ) -> None:
        pairs = list(zip(leases, names, strict=False))
        settled = self.run(self.settle_in_transaction([RESULTS[n](lease) for lease, n in pairs]))

        live = [(lease, name) for lease, name in pairs if self.holds(lease)]
        assert settled.delivery_ids == {lease.id for lease, _ in live}
        failed_since: Counter[UUID] = Counter()
        gone = {lease.webhook_id for lease, name in live if name == "gone"}
        ended = set()
        for lease, name in live:
            delivery, config = self.deliveries[lease.id], self.configs[lease.webhook_id]
            delivery.attempt_count += 1
            delivery.lease_id = None
            if name == "delivered":
                delivery.state, config.failures = DeliveryState.DELIVERED, 0
                failed_since[lease.webhook_id] = 0
            elif name.startswith("retried"):
                delivery.state = READY
            else:
                delivery.state = DeliveryState.FAILED
                config.failures += name != "broken"
                failed_since[lease.webhook_id] += name != "broken"
            if delivery.chain and delivery.state is not READY:
                ended.add(delivery.chain)
        deactivated = {
            webhook_id: "gone" if webhook_id in gone else "failures"
            for webhook_id, count in failed_since.items()
            if self.configs[webhook_id].active
            if webhook_id in gone or (count and self.configs[webhook_id].failures >= LIMIT)
        }
        assert settled.deactivated == deactivated
        for webhook_id, reason in deactivated.items():
            self.configs[webhook_id].active = False
            self.configs[webhook_id].reason = reason
            self.park_ready(webhook_id)
        assert set(settled.ended_chains) == ended
        if not crashes:
            self.run(queue.promote(self.connection, settled.ended_chains))
            self.promote_first(ended)

    @rule()
    def sweep(self) -> None:
        """Promote the first of every stranded chain."""
        self.run(promote_stranded(self.connection, None))
        self.promote_first({d.chain for d in self.deliveries.values() if d.chain})

    async def settle_in_transaction(self, settlements: list[Any]) -> queue.SettleResult:
        async with self.connection.transaction():
            return await queue.settle(self.connection, settlements, LIMIT)

    @rule(indexes=st.sets(INDEX, min_size=1, max_size=5), parked=st.booleans())
    def give_up(self, indexes: set[int], parked: bool) -> None:
        leases = [self.pick_lease(index) for index in sorted(indexes)]
        give_up = queue.park_leased if parked else queue.release
        self.run(give_up(self.connection, leases))
        for lease in leases:
            if self.holds(lease):
                delivery = self.deliveries[lease.id]
                delivery.state, delivery.lease_id = PARKED if parked else READY, None

    @rule(indexes=st.lists(INDEX, min_size=1, max_size=4), limit=st.integers(1, 4))
    def expire_and_reclaim(self, indexes: list[int], limit: int) -> None:
        ended = [self.pick_lease(index) for index in indexes]
        self.run(
            self.connection.execute(
                "UPDATE delivery_queue SET lease_until = now() - interval '1 second'"
                " WHERE lease_id = ANY ($1) AND id = ANY ($2)",
                [lease.lease_id for lease in ended],
                [lease.id for lease in ended],
            )
        )
        expired = self.ids("SELECT id FROM delivery_queue WHERE lease_until < now()")
        reclaimed = self.run(queue.reclaim(self.connection, limit))
        assert len(reclaimed) == len(set(reclaimed)) == min(limit, len(expired))
        assert expired.issuperset(reclaimed)
        for delivery_id in reclaimed:
            delivery = self.deliveries[delivery_id]
            delivery.state, delivery.lease_id = READY, None

    # --- backlogs and time

    @rule(size=st.integers(1, 4))
    def admit(self, size: int) -> None:
        fed, due = self.run(self.admit_beside_a_reading(size))
        expected = set()
        for webhook_id, config in self.configs.items():
            own = {i: d for i, d in self.deliveries.items() if d.webhook_id == webhook_id}
            room = size if config.breaker == "closed" else 1
            free = room - sum(i in due for i, d in own.items() if d.state is not PARKED)
            parked = sorted(i for i, d in own.items() if d.state is PARKED)
            if config.breaker != "closed":
                parked = [i for i in parked if i in due]
            may = config.deleted or (config.active and config.breaker != "open")
            if may and parked and free >= (room + 1) // 2:
                expected.add(webhook_id)
                for delivery_id in parked[:free]:
                    self.deliveries[delivery_id].state = READY
        assert fed == expected

    async def admit_beside_a_reading(self, size: int) -> tuple[set[UUID], set[UUID]]:
        async with self.connection.transaction():
            due = {row["id"] for row in await self.connection.fetch(_IS_DUE)}
            backlog = await queue.webhooks_with_backlog(self.connection)
            assert set(backlog) == {
                d.webhook_id for d in self.deliveries.values() if d.state is PARKED
            }
            return await queue.admit(self.connection, dict.fromkeys(backlog, size)), due

    @rule()
    def let_time_pass(self) -> None:
        """All backoffs end."""
        self.run(
            self.connection.execute(
                "UPDATE delivery_queue SET due_at = now()"
                " WHERE due_at > now() AND state <> 'blocked'"
            )
        )

    # --- invariants

    @invariant()
    def database_and_model_agree(self) -> None:
        # places() fails if a delivery is both queued and finished.
        found = self.run(places(self.connection))
        assert found.keys() == self.deliveries.keys(), "a delivery was lost or invented"
        for delivery_id, delivery in self.deliveries.items():
            place = found[delivery_id]
            assert place.state == delivery.state
            assert place.attempt_count == delivery.attempt_count
            assert place.lease_id == delivery.lease_id, "two leases of one delivery"

    @invariant()
    def states_follow_the_lifecycle(self) -> None:
        found = self.run(places(self.connection))
        for delivery_id, delivery in self.deliveries.items():
            state = DeliveryState(found[delivery_id].state)
            if delivery.seen is None:
                assert state in {READY, PARKED, BLOCKED}
            else:
                assert state == delivery.seen or state in TRANSITIONS[delivery.seen]
            delivery.seen = state

    @invariant()
    def only_the_first_of_a_chain_is_unblocked(self) -> None:
        chains: dict[Chain, list[Delivery]] = {}
        for delivery in self.deliveries.values():
            if delivery.chain and delivery.state in OPEN_STATES:
                chains.setdefault(delivery.chain, []).append(delivery)
        for _, *others in chains.values():
            assert {other.state for other in others} <= {BLOCKED}

    @invariant()
    def attempts_are_dense_and_never_fall(self) -> None:
        numbers: dict[UUID, list[int]] = {}
        for delivery_id, number, _ in self.run(attempts(self.connection)):
            numbers.setdefault(delivery_id, []).append(number)
        for delivery_id, delivery in self.deliveries.items():
            assert numbers.pop(delivery_id, []) == [*range(1, delivery.attempt_count + 1)]
        assert not numbers, "attempts without a delivery"

    @invariant()
    def configs_and_events_agree(self) -> None:
        for webhook_id, config in self.configs.items():
            expected = (config.active, config.reason, config.failures)
            assert self.run(health(self.connection, webhook_id)) == expected
            row = self.run(self.connection.fetchrow(_BREAKER, webhook_id))
            assert tuple(row) == (config.breaker, config.trips)
        [row] = self.run(
            self.connection.fetch("SELECT count(*), sum(delivery_count)::int FROM events")
        )
        assert tuple(row) == (self.event_count, len(self.deliveries) if self.event_count else None)

    # --- parts of the rules

    def pick_config(self, index: int) -> UUID:
        living = self.living()
        return living[index % len(living)]

    def pick_lease(self, index: int) -> LeasedDelivery:
        """One of the latest leases, because older ones are certainly lost."""
        recent = self.leases[-10:]
        return recent[index % len(recent)]

    def living(self) -> list[UUID]:
        return [webhook_id for webhook_id, config in self.configs.items() if not config.deleted]

    def backlogs(self) -> set[UUID]:
        return {d.webhook_id for d in self.deliveries.values() if d.state is PARKED}

    def holds(self, lease: LeasedDelivery) -> bool:
        delivery = self.deliveries[lease.id]
        return delivery.state is LEASED and delivery.lease_id == lease.lease_id

    def first_of(self, chain: Chain) -> Delivery | None:
        """The open delivery of a chain that was accepted first."""
        members = (d for d in self.deliveries.values() if d.chain == chain)
        return next((d for d in members if d.state in OPEN_STATES), None)

    def promote_first(self, chains: set[Chain]) -> None:
        for chain in chains:
            first = self.first_of(chain)
            if first and first.state is BLOCKED:
                config = self.configs[chain.webhook_id]
                first.state = READY if config.active and config.breaker == "closed" else PARKED

    def park_ready(self, webhook_id: UUID) -> None:
        for delivery in self.deliveries.values():
            if delivery.webhook_id == webhook_id and delivery.state is READY:
                delivery.state = PARKED


def test_queue_matches_its_model(database_url: str) -> None:
    with asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(database_url))
        run_state_machine_as_test(
            lambda: QueueMachine(runner, connection),  # type: ignore[arg-type]
            settings=settings(
                max_examples=120,
                stateful_step_count=30,
                deadline=None,
                # Shrinking takes minutes here: raise the phases by hand when a failure needs it.
                phases=[Phase.generate],
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        runner.run(connection.close())
