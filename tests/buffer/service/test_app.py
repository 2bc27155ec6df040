"""What the service refuses, and what it keeps when clients leave, repeat themselves, fall silent or come anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from buffer import payload
from buffer.intake import ModelLimits, Result
from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.policy import Policy
from buffer.prompts.order import PromptOrder
from buffer.service import bodies, frames
from buffer.service.app import ServedRun, create_app
from buffer.service.client import HttpBuffer
from buffer.service.serve import serving
from slime.errors import BufferFull, ConfigError, DataError, Fenced, LedgerError
from slime.types import Group, Lease
from tests.builders import make_group, make_prompt
from tests.served import RUN, TOKEN

Serve = Callable[..., Any]
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
MAX_BODY_BYTES = 100_000
VOCAB_SIZE, CONTEXT_TOKENS = 1000, 50


class Service:
    """A service in this event loop, which can be stopped and started again over the same run directory."""

    def __init__(self, run_dir: Path, **options: Any) -> None:
        self._run_dir = run_dir
        self._options = options
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        self.ledger = self._stack.enter_context(Ledger(self._run_dir))
        prompts = PromptOrder([make_prompt(f"{i:016x}", text=f"{i} + 1 =") for i in range(7)], seed=0, shuffle=False)
        policy = Policy(groups_per_step=2, num_steps=5, max_staleness=self._options.get("max_staleness", 0))
        limits = ModelLimits(vocab_size=VOCAB_SIZE, context_tokens=CONTEXT_TOKENS)
        self.local = LocalBuffer(self.ledger, prompts, policy, limits=limits, recover=False)
        options = {name: value for name, value in self._options.items() if name != "max_staleness"}
        run = ServedRun(buffer=self.local, ledger=self.ledger, **options)
        app = create_app({RUN: run}, token=TOKEN, max_body_bytes=MAX_BODY_BYTES)
        self.url = await self._stack.enter_async_context(serving(app))
        self.client = await self.new_client()
        self.http = await self._stack.enter_async_context(
            httpx.AsyncClient(base_url=f"{self.url}/runs/{RUN}/", headers=HEADERS, timeout=10)
        )

    async def stop(self) -> None:
        await self._stack.aclose()

    async def new_client(self) -> HttpBuffer:
        client = HttpBuffer(self.url, run=RUN, token=TOKEN, patience_s=0.3)
        return await self._stack.enter_async_context(client)

    async def refused(self, method: str, path: str, **request: Any) -> tuple[int, str, str]:
        """Status, class and message of a refusal, which must be one."""
        answer = await self.http.request(method, path, **request)
        body = bodies.ErrorBody.model_validate_json(answer.content)
        assert answer.status_code >= 400
        assert len(body.message) > 10
        return answer.status_code, body.error, body.message


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:

        async def start(**options: Any) -> Service:
            service = Service(tmp_path, **options)
            stack.push_async_callback(service.stop)
            await service.start()
            return service

        yield start


@pytest.fixture
async def service(serve: Serve) -> Service:
    started: Service = await serve()
    await started.client.published(0)
    return started


def group_of(lease: Lease, *, version: int = 0) -> Group:
    group = make_group(uid=lease.prompt.uid, ordinal=lease.ordinal, version=version)
    group.attempt = lease.attempt
    group.prompt = lease.prompt
    return group


def pushed(request: str = "r1", **changes: Any) -> dict[str, Any]:
    sample = {"tokens": [1, 2, 3], "loss_mask": [0, 1, 1], "logprobs": [0, -1, -0.5], "version": 0, "reward": 1}
    return {"request": request, "prompt": {"text": "2 + 2 ="}, "samples": [sample | changes]}


@pytest.mark.parametrize(
    "given", [None, "Bearer", "Bearer wrong-wrong-wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}é"]
)
async def test_without_the_token_nothing_is_told_and_nothing_is_read(service: Service, given: str | None) -> None:
    """Pins: a path that forgot to ask, and a body of a stranger held in memory."""
    headers = {} if given is None else {"Authorization": given.encode()}
    async with httpx.AsyncClient(base_url=service.url, headers=headers) as http:
        for method, path in [("GET", "stats"), ("POST", "push"), ("PUT", "consumer"), ("GET", "nothing")]:
            answer = await http.request(method, f"/runs/{RUN}/{path}", content=b"x" * 2 * MAX_BODY_BYTES)
            assert (answer.status_code, answer.json()["error"]) == (401, "Unauthorized")
        assert (await http.get("/health")).json() == {"status": "ok"}
        assert (await http.get("/openapi.json")).status_code == 200


@pytest.mark.parametrize(
    "name", ["..", ".", "../run-1", "%2e%2e", "a%00b", "%2fetc%2fpasswd", "run-2", "%c3%a9", "x" * 65]
)
async def test_a_name_that_is_no_run_leads_nowhere(service: Service, name: str) -> None:
    """Pins: a run directory that is left through its name."""
    async with httpx.AsyncClient(headers=HEADERS) as http:
        answer = await http.get(f"{service.url}/runs/{name}/stats")
    assert answer.status_code in (404, 422)
    assert set(answer.json()) == {"error", "message"}


async def test_the_client_takes_the_address_that_serve_prints(service: Service) -> None:
    """Pins a bare "Not Found" for whoever copies what he was shown."""
    for url in (service.url, f"{service.url}/runs/{RUN}", f"{service.url}/runs/{RUN}/\n"):
        async with HttpBuffer(url, run=RUN, token=TOKEN, patience_s=0.3) as client:
            assert (await client.stats()).version == 0


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "a\0b", "x" * 65, "a b", "a\n"])
def test_a_run_is_not_served_under_a_name_that_is_no_file_name(name: str) -> None:
    with pytest.raises(ConfigError, match="run name"):
        create_app({name: None}, token=TOKEN)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "body"),
        (b"{", "not JSON"),
        (b'{"request": "a", "wait_s": NaN}', "not JSON"),
        (b'{"request": "a", "wait_s": 1e400}', "wait_s"),
        (b'{"request": "a", "wait_s": -1}', "wait_s"),
        (b'{"request": "a", "more": 1}', "more"),
        (b'{"request": "\\ud800"}', "not JSON"),
        (b'{"request": "a\\u0000"}', "request"),
        (b'{"request": "../../a"}', "request"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
    ],
)
async def test_a_malformed_body_is_refused_with_what_is_wrong(service: Service, content: bytes, says: str) -> None:
    """Pins: a stack overflow, a NaN in the ledger, and a misspelt key that is ignored."""
    status, error, message = await service.refused(
        "POST", "admit", content=content, headers={"Content-Type": "application/json"}
    )
    assert (status, says in message) == (422, True), (error, message)


async def test_a_body_too_large_is_cut_off_also_when_it_does_not_say_its_size(service: Service) -> None:
    """Pins: memory that a client fills by streaming."""

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"x" * 10_000

    for content in (b"x" * (MAX_BODY_BYTES + 1), endless()):
        answer = await service.http.post("push_batch", content=content)
        assert (answer.status_code, set(answer.json())) == (413, {"error", "message"})


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"loss_mask": [0, 1]}, 422, "3 tokens, 2 entries"),
        ({"logprobs": [0]}, 422, "1 logprobs"),
        ({"logprobs": [0, -1, 0.5]}, 422, "logprobs"),
        ({"logprobs": [0, -1, None]}, 422, "logprobs"),
        ({"loss_mask": [0, 0, 0]}, 422, "no token that the policy sampled"),
        ({"loss_mask": [0, 1, 2]}, 422, "loss_mask"),
        ({"tokens": [-1, 2, 3]}, 422, "tokens"),
        ({"tokens": [2**31, 2, 3]}, 422, "tokens"),
        ({"version": 1}, 409, "version 1, and version 0 is the last"),
        ({"messages": [{"role": "assistant", "content": "4"}]}, 422, "both 'messages' and 'tokens'"),
        ({"metadata": {"deep": [1e308]}, "temperature": 0}, 422, "temperature"),
        ({"reward": "1"}, 422, "reward"),
        ({"reward": 1.7e308}, 422, "reward"),
        ({"temperature": 1e-320}, 422, "temperature"),
        ({"logprobs": [0, -1, -1e39]}, 422, "logprobs"),
    ],
)
async def test_a_group_that_cannot_be_trained_is_not_taken_in(
    service: Service, changes: dict[str, Any], status: int, says: str
) -> None:
    """Pins: arrays that slide against each other, and log-probs or versions that were made up."""
    got, _, message = await service.refused("POST", "push", json=pushed(**changes))
    assert (got, says in message) == (status, True), message
    assert (await service.client.stats()).num_ready == 0


@pytest.mark.parametrize("tokens", [[1, VOCAB_SIZE], [1] * (CONTEXT_TOKENS + 1)])
async def test_tokens_that_the_model_does_not_have_are_refused_on_every_way_in(
    service: Service, tokens: list[int]
) -> None:
    """Pins a group that is taken in, ends the training process, and ends it again after every start."""
    mask = [0, *[1] * (len(tokens) - 1)]
    assert (await service.refused("POST", "push", json=pushed(tokens=tokens, loss_mask=mask, logprobs=None)))[0] == 422
    lease = await service.client.admit()
    group = group_of(lease)
    sample = group.samples[0]
    sample.append(tokens[len(sample.tokens) :] or tokens, logprobs=None)
    body = payload.encode(group)
    assert isinstance((await service.client.push_batch([("r2", body)]))[0], DataError)
    assert isinstance((await service.client.put_batch([Result(ordinal=0, attempt=0, payload=body)]))[0], DataError)
    for send in (service.client.put(lease, group, keep=True), service.client.requeue(lease, reason="r", partial=group)):
        with pytest.raises(DataError, match="this run's model"):
            await send
    assert (await service.client.stats()).num_ready == 0
    await service.client.put(lease, group_of(lease), keep=True)


async def test_numbers_that_no_float_holds_are_refused_wherever_they_hide(service: Service) -> None:
    """Pins: a 500, or an infinity in the ledger, from 1e400, which is JSON."""
    huge = b'{"request": "r", "prompt": {"text": "x", "label": {"a": [1e400]}}, "samples": []}'
    commit = b'{"consumer": 1, "step": 1, "checkpoint": "c", "state": {"x": -1e999}}'
    for path, content in (("push", huge), ("commit", commit)):
        status, _, message = await service.refused(
            "POST", path, content=content, headers={"Content-Type": "application/json"}
        )
        assert (status, "too large" in message) == (422, True), message


async def test_one_bad_group_of_a_batch_leaves_the_others_in(service: Service) -> None:
    """Pins: a batch that is lost for one of its groups."""
    leases = [await service.client.admit() for _ in range(2)]
    good = payload.encode(group_of(leases[0]))
    answers = await service.client.put_batch(
        [
            Result(ordinal=leases[0].ordinal, attempt=0, payload=good),
            Result(ordinal=leases[1].ordinal, attempt=0, payload=good),
            Result(ordinal=leases[1].ordinal, attempt=0, payload=b"slg1 nonsense"),
            Result(ordinal=99, attempt=0, payload=good),
            Result(ordinal=leases[0].ordinal, attempt=0, payload=good),
        ]
    )
    assert [type(answer) for answer in answers] == [bool, LedgerError, DataError, LedgerError, bool]
    assert (answers[0], answers[4]) == (True, False)
    assert (await service.client.stats()).num_ready == 1
    for body in (b"", b"slf1", b"slf1\xff\xff\xff\xff[]", frames.pack([]) + b"x", b"slf1\x02\0\0\0[]["):
        status, error, _ = await service.refused("POST", "put_batch", content=body)
        assert (status, error) == (422, "DataError")
    assert service.ledger.audit().holds


async def test_back_pressure_is_an_answer_and_not_a_queue(service: Service) -> None:
    """Pins: groups pushed without bound, to be thrown away as too old."""
    for i in range(2):
        await service.client.push(bodies.PushBody.model_validate(pushed(f"r{i}")))
    answer = await service.http.post("push", json=pushed("r2"))
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    with pytest.raises(BufferFull):
        await service.client.push(bodies.PushBody.model_validate(pushed("r2")))
    group = payload.encode(make_group(uid="00"))
    (again, refused) = await service.client.push_batch([("r1", group), ("r3", group)])
    assert (again, type(refused)) == (1, BufferFull), "what was accepted before stays accepted"


async def test_requests_that_are_repeated_take_effect_once(service: Service) -> None:
    """Pins: a lease, a group or a step that is there twice because an answer got lost."""
    client = service.client
    lease = await client.admit(request="a")
    assert await client.admit(request="a") == lease
    assert await client.put(lease, group_of(lease), keep=True)
    assert not await client.put(lease, group_of(lease), keep=True)
    with pytest.raises(LedgerError, match="graded now"):
        await client.admit(request="a")
    body = bodies.PushBody.model_validate(pushed("a"))
    assert [await client.push(body), await client.push(body)] == [1, 1]
    taken = await client.take(2, step=1)
    assert await client.take(2, step=1) == taken
    await client.commit(1, checkpoint="c1", state={"x": 1})
    await client.commit(1, checkpoint="c1", state={"x": 1})
    with pytest.raises(LedgerError):
        await client.commit(1, checkpoint="other", state={})
    assert (await client.stats()).num_committed == 2
    assert service.ledger.audit().holds


async def test_one_request_sent_twice_at_once_gets_one_lease_and_one_step(service: Service) -> None:
    """Pins: a retry that overtakes its first try, which then packs other groups into the same step."""
    client, second = service.client, await service.new_client()
    consumer = (await client.consume()).consumer
    leases = [await client.admit() for _ in range(2)]
    waits = [asyncio.create_task(c.admit(request="again")) for c in (client, second)]
    take = bodies.TakeBody(consumer=consumer, step=1, num_groups=1).model_dump()
    takes = [asyncio.create_task(service.http.post("take", json=take)) for _ in range(2)]
    await asyncio.sleep(0.1)
    for lease in leases:
        await client.put(lease, group_of(lease), keep=True)
    first, other = await asyncio.wait_for(asyncio.gather(*takes), 10)
    assert first.content == other.content
    await client.commit(1, checkpoint="c1", state={})
    await client.published(1)
    assert len({(lease.ordinal, lease.attempt) for lease in await asyncio.wait_for(asyncio.gather(*waits), 10)}) == 1


async def test_a_consumer_that_was_taken_over_from_is_fenced_even_while_it_waits(service: Service) -> None:
    """Pins: two trainers that each train half of a step, or the same step."""
    old, new = service.client, await service.new_client()
    waiting = asyncio.create_task(old.take(2, step=1))
    leases = [await old.admit() for _ in range(2)]
    await asyncio.sleep(0.1)
    last = await new.consume()
    assert last.last_commit is None
    for lease in leases:
        await new.put(lease, group_of(lease), keep=True)
    with pytest.raises(Fenced):
        await asyncio.wait_for(waiting, 10)
    for word in (old.published(1), old.release(), old.commit(1, checkpoint="c", state={}), old.take(2, step=1)):
        with pytest.raises(Fenced):
            await word
    assert len(await new.take(2, step=1)) == 2


async def test_what_a_dead_consumer_had_taken_goes_to_the_next(service: Service) -> None:
    """Pins: groups that are packed for a trainer that is gone."""
    first = service.client
    for _ in range(2):
        lease = await first.admit()
        await first.put(lease, group_of(lease), keep=True)
    taken = await first.take(2, step=1)
    await first.published(1)
    third = await first.admit()
    second = await service.new_client()
    await second.consume()
    await second.published(0)
    assert not await second.put(third, group_of(third), keep=True), "its weights are gone with the step"
    assert await second.take(2, step=1) == taken
    await second.commit(1, checkpoint="c1", state={"lr": 0.5})
    third_client = await service.new_client()
    last = (await third_client.consume()).last_commit
    assert last is not None
    assert (last.step, last.checkpoint, last.state) == (1, "c1", {"lr": 0.5})
    assert await third_client.release() == 0
    assert service.ledger.audit().holds


async def test_a_silent_lease_is_given_to_others_and_its_late_result_is_discarded(serve: Serve) -> None:
    """Pins: a step that waits for ever for a worker that died, and a group that then comes in twice."""
    service: Service = await serve(lease_s=0.15)
    client = service.client
    await client.published(0)
    kept, silent = [await client.admit() for _ in range(2)]
    next_one = asyncio.create_task(client.admit())
    while not next_one.done():
        await asyncio.wait({next_one}, timeout=0.05)
        assert await client.renew([kept]) == [True]
    assert (next_one.result().ordinal, next_one.result().attempt) == (silent.ordinal, 1)
    assert await client.renew([kept, silent]) == [True, False]
    assert not await client.put(silent, group_of(silent), keep=True)
    assert await client.put(next_one.result(), group_of(next_one.result()), keep=True)
    assert await client.put(kept, group_of(kept), keep=True)
    assert (await client.stats()).num_stale == 1
    assert service.ledger.audit().holds


async def test_leases_consumer_and_version_outlive_the_service(serve: Serve) -> None:
    """Pins: a restart of the service that costs its clients their work, or leaves them waiting for a publish."""
    before: Service = await serve(max_staleness=1)
    await before.client.published(0)
    lease, other = [await before.client.admit(request=name) for name in ("a", "b")]
    consumer = await before.client.consume()
    await before.stop()
    after: Service = await serve(max_staleness=1)
    assert await after.client.admit(request="a") == lease
    assert await after.client.put(lease, group_of(lease), keep=True)
    assert await after.client.put(other, group_of(other), keep=True)
    take = bodies.TakeBody(consumer=consumer.consumer, step=1, num_groups=2)
    answer = await after.http.post("take", json=take.model_dump())
    assert answer.status_code == 200, answer.text
    assert (await after.client.admit()).ordinal == 2
    assert after.ledger.audit().holds


async def test_a_partial_group_comes_with_its_lease(service: Service) -> None:
    """Pins: samples that got lost between two workers."""
    lease = await service.client.admit()
    group = group_of(lease)
    with pytest.raises(LedgerError, match="which is prompt"):
        await service.client.requeue(lease, reason="parked", partial=make_group(uid="another"))
    assert await service.client.requeue(lease, reason="parked", partial=group)
    again = await service.client.admit()
    assert again.partial is not None
    assert again.partial.samples == group.samples
    assert await service.client.put(again, group_of(again), keep=True)
    with pytest.raises(LedgerError, match="handed in"):
        await service.client.requeue(again, reason="too late")


async def test_words_about_what_is_not_there_are_refused(service: Service) -> None:
    lease = await service.client.admit()
    nobody = bodies.AttemptBody(ordinal=77, attempt=0)
    ahead = bodies.AttemptBody(ordinal=lease.ordinal, attempt=5)
    for attempt, says in ((nobody, "no instance 77"), (ahead, "no attempt 5")):
        for word in (
            service.client.generated(attempt),
            service.client.drop(attempt, reason="x"),
            service.client.requeue(attempt, reason="x"),
        ):
            with pytest.raises(LedgerError, match=says):
                await word
    assert await service.client.renew([nobody, ahead, lease]) == [False, False, True]
    assert (await service.refused("GET", "partial?ordinal=77&attempt=0"))[0] == 404
    assert (await service.refused("GET", "instances/ffff"))[0] == 404
    (instance,) = await service.client.instances(lease.prompt.uid)
    assert (instance.ordinal, instance.state) == (lease.ordinal, "running")


async def test_the_trainer_of_a_served_run_is_not_taken_over_from_outside(serve: Serve) -> None:
    """Pins: a client that unpacks the step which the run's own process is training."""
    service: Service = await serve(takes_consumers=False)
    await service.local.published(0)
    with pytest.raises(LedgerError, match="trains it"):
        await service.client.consume()
    with pytest.raises(LedgerError):
        await service.client.published(3)
    assert await service.client.push(bodies.PushBody.model_validate(pushed())) == 0


async def test_the_end_of_the_service_ends_long_polls_at_once_and_loses_nothing(serve: Serve) -> None:
    """Pins: a shutdown that waits for its clients' patience, and a lease granted on the way out."""
    service: Service = await serve()
    await service.client.consume()
    take = bodies.TakeBody(consumer=1, step=1, num_groups=2, wait_s=60).model_dump()
    async with httpx.AsyncClient(base_url=service.http.base_url, headers=HEADERS, timeout=60) as http:
        polls = [
            asyncio.create_task(http.post("admit", json={"request": "a", "wait_s": 60})),
            asyncio.create_task(http.post("take", json=take)),
        ]
        await asyncio.sleep(0.1)
        stopping = asyncio.create_task(service.stop())
        answers = await asyncio.wait_for(asyncio.gather(*polls), 10)
    assert [(answer.status_code, answer.json()["error"]) for answer in answers] == [(503, "StopRun")] * 2
    await asyncio.wait_for(stopping, 10)


async def test_a_client_that_leaves_while_it_waits_takes_nothing_with_it(service: Service) -> None:
    """Pins: an instance leased to nobody until its lease ends."""
    leases = [await service.client.admit() for _ in range(2)]
    leaving = asyncio.create_task(service.http.post("admit", json={"request": "gone", "wait_s": 60}))
    await asyncio.sleep(0.1)
    leaving.cancel()
    await asyncio.wait({leaving})
    await asyncio.sleep(0.1)
    await service.client.drop(leases[0], reason="x")
    assert (await service.client.stats()).num_running == 1
