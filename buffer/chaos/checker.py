"""The history checker: what clients saw of a buffer, held against its ledger when all is over.

Clients record (`buffer.chaos.history`), with what they say and are answered:

    admit     request → ordinal, attempt
    put       ordinal, attempt, uid, samples (a fingerprint), version (of the oldest token)
    drop, requeue      ordinal, attempt
    push      request, uid, samples, version → ordinal
    consume   → consumer
    take      consumer, step → groups: [[ordinal, attempt, fingerprint], ...]
    commit    consumer, step, checkpoint (a name of its own)

Every rule below yields what breaks it, in words. What is acknowledged must be on record, what is refused must not be,
and what is unknown may be there, once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from buffer import schema
from buffer.books.audit import audit_run
from buffer.books.reading import read_ledger
from buffer.chaos.history import Operation, fingerprint
from buffer.payload import decode
from buffer.schema import State
from slime.errors import DataError

ON_RECORD = {"put": State.GRADED, "drop": State.DROPPED, "requeue": schema.REQUEUED}
"""The event that an acknowledged report of a rollout worker leaves behind, unless it came too late."""

DISCARDED = (schema.STALE, schema.REPEATED)


class _Row(NamedTuple):
    uid: str
    attempt: int
    state: str
    step: int | None
    position: int | None
    request: str | None


class _Attempt(NamedTuple):
    ordinal: int
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Books:
    """What the ledger ends with."""

    instances: dict[int, _Row]
    events: set[tuple[int, int, str, str]]
    """``(ordinal, attempt, event, what)``: for a report that was discarded, what it would have led to."""
    commits: dict[int, str]
    """Step → checkpoint."""
    samples: dict[_Attempt, str]
    """Fingerprints of the groups that are graded or packed."""


def check_history(
    operations: Sequence[Operation], run_dir: Path, *, groups_per_step: int, max_staleness: int
) -> list[str]:
    """Everything in which a history and the ledger in `run_dir` contradict each other or the promises; [] when nothing.

    Raises:
        LedgerError: there is no ledger, or it cannot be read.
    """
    audit = audit_run(run_dir)
    books = _read(run_dir)
    history = _History(operations, books)
    return [
        *([] if audit.holds else [f"audit: {line}" for line in str(audit).splitlines()]),
        *_pushes(history, books),
        *_leases(history, books),
        *_reports(history, books),
        *_samples(history, books),
        *_consumers(history),
        *_commits(history, books),
        *_takes(history),
        *_steps(history, books, groups_per_step=groups_per_step, max_staleness=max_staleness),
        *_trained_once(history, books),
    ]


def _read(run_dir: Path) -> _Books:
    with read_ledger(run_dir) as db:
        rows = db.execute("SELECT ordinal, prompt_uid, attempt, state, step, position, request FROM instances")
        instances = {ordinal: _Row(*row) for ordinal, *row in rows}
        payloads = db.execute(
            "SELECT ordinal, body FROM payloads JOIN instances USING (ordinal) WHERE state IN ('graded', 'packed')"
        )
        return _Books(
            instances=instances,
            events=set(
                db.execute(f"SELECT ordinal, attempt, event, iif(event IN {DISCARDED}, detail, '') FROM events")
            ),
            commits=dict(db.execute("SELECT step, checkpoint FROM commits")),
            samples={_Attempt(ordinal, instances[ordinal].attempt): _fingerprint(body) for ordinal, body in payloads},
        )


def _fingerprint(body: bytes) -> str:
    try:
        return fingerprint(decode(body, ordinal=0, epoch=0, attempt=0))
    except DataError as error:
        return str(error)  # which nobody handed in


class _History:
    """A history, sorted."""

    def __init__(self, operations: Sequence[Operation], books: _Books) -> None:
        self._of_kind: defaultdict[str, list[Operation]] = defaultdict(list)
        for operation in operations:
            self._of_kind[operation.kind].append(operation)
        self.pushes = self.by("push", "request")
        self.commits = self.by("commit", "checkpoint")
        self.takes: defaultdict[tuple[int, int], list[Operation]] = defaultdict(list)
        """The answered ones, by consumer and step."""
        for operation in self.of("take"):
            if operation.is_ok:
                self.takes[operation.said["consumer"], operation.said["step"]].append(operation)
        self.handed_in: defaultdict[_Attempt, dict[str, int]] = defaultdict(dict)
        """Fingerprint → oldest version of all that anybody handed in as an attempt, acknowledged or not."""
        for operation in self.of("put"):
            self.handed_in[_attempt(operation)][operation.said["samples"]] = operation.said["version"]
        for ordinal, row in books.instances.items():
            for operation in self.pushes.get(row.request, []) if row.position is None else ():
                self.handed_in[_Attempt(ordinal, 0)][operation.said["samples"]] = operation.said["version"]

    def of(self, kind: str) -> list[Operation]:
        return self._of_kind[kind]

    def by(self, kind: str, key: str) -> dict[str | None, list[Operation]]:
        """The operations of a kind, by what they said."""
        found: dict[str | None, list[Operation]] = {}
        for operation in self.of(kind):
            found.setdefault(operation.said[key], []).append(operation)
        return found


def _attempt(operation: Operation) -> _Attempt:
    return _Attempt(operation.said["ordinal"], operation.said["attempt"])


def _answers(operations: Iterable[Operation], *keys: str) -> set[tuple[object, ...]]:
    return {tuple(operation.answer[key] for key in keys) for operation in operations if operation.answer is not None}


def _pushes(history: _History, books: _Books) -> Iterator[str]:
    """An acknowledged push is there, a refused one is not, and none is there twice."""
    recorded = {row.request: ordinal for ordinal, row in books.instances.items() if row.position is None}
    for request, calls in history.pushes.items():
        answers = {ordinal for (ordinal,) in _answers(calls, "ordinal")}
        found = recorded.get(request)
        if answers - {found}:
            yield f"push {request}: acknowledged as instance {answers}, and on record as {found}"
        if found is not None and all(call.is_refused for call in calls):
            yield f"push {request}: refused, and on record as instance {found}"
    asked = {uid: {call.said["request"] for call in calls} for uid, calls in history.by("push", "uid").items()}
    outside = Counter(row.uid for row in books.instances.values() if row.position is None)
    for uid, count in outside.items():
        if count > len(asked.get(uid, ())):
            yield f"prompt {uid}: pushed by {len(asked.get(uid, ()))} requests, and on record {count} times"


def _leases(history: _History, books: _Books) -> Iterator[str]:
    """One request gets one lease, however often it is sent, until that is given back; one lease goes to one request."""
    holders: defaultdict[tuple[object, ...], set[object]] = defaultdict(set)
    for request, calls in history.by("admit", "request").items():
        answers = _answers(calls, "ordinal", "attempt")
        if sum(not _given_back(lease, books) for lease in answers) > 1:
            yield f"admit {request}: answered with {sorted(answers, key=str)}"
        for lease in answers:
            holders[lease].add(request)
    for lease, requests in holders.items():
        if len(requests) > 1:
            yield f"instance {lease[0]}, attempt {lease[1]}: leased to {sorted(requests, key=str)}"


def _given_back(lease: tuple[object, ...], books: _Books) -> bool:
    ordinal, attempt = lease
    return isinstance(attempt, int) and (ordinal, attempt + 1, schema.REQUEUED, "") in books.events


def _reports(history: _History, books: _Books) -> Iterator[str]:
    """What a rollout worker reported and was acknowledged is on record, or was discarded on record."""
    for kind, event in ON_RECORD.items():
        for operation in history.of(kind):
            ordinal, attempt = _attempt(operation)
            recorded = (ordinal, attempt + (event in schema.ISSUED_AGAIN), event, "") in books.events
            discarded = any((ordinal, attempt, late, event) in books.events for late in DISCARDED)
            if operation.is_ok and not recorded and not discarded:
                yield f"{kind} of instance {ordinal}, attempt {attempt}: acknowledged, and not on record"


def _samples(history: _History, books: _Books) -> Iterator[str]:
    """The samples that wait to be trained are those that were handed in."""
    for group, found in books.samples.items():
        if found not in history.handed_in[group]:
            yield f"instance {group.ordinal}, attempt {group.attempt}: its samples are not those that were handed in"


def _consumers(history: _History) -> Iterator[str]:
    """Incarnations count upwards, and an older one is refused from the moment that the next is acknowledged."""
    takeovers = [(operation, operation.answer["consumer"]) for operation in history.of("consume") if operation.answer]
    for first, number in takeovers:
        for second, later in takeovers:
            if first.ended is not None and first.ended < second.began and later <= number:
                yield f"consumer {later} took over after consumer {number}"
    newest: list[tuple[int, int]] = sorted((operation.ended or 0, number) for operation, number in takeovers)
    for operation in [*history.of("take"), *history.of("commit")]:
        consumer = operation.said["consumer"]
        fences = [number for ended, number in newest if ended < operation.began and number > consumer]
        if operation.is_ok and fences:
            what = f"{operation.kind} of step {operation.said['step']} by consumer {consumer}"
            yield f"{what}: acknowledged after consumer {fences[0]} took over"


def _commits(history: _History, books: _Books) -> Iterator[str]:
    """An acknowledged commit is current from then on; a refused one never; and nobody else commits."""
    on_record: dict[str | None, int] = {checkpoint: step for step, checkpoint in books.commits.items()}
    for checkpoint, calls in history.commits.items():
        step, found = calls[0].said["step"], on_record.get(checkpoint)
        if any(call.is_ok for call in calls) and found != step:
            yield f"commit of {checkpoint} at step {step}: acknowledged, and not on record"
        if found is not None and all(call.is_refused and not _fenced_meanwhile(call, history) for call in calls):
            yield f"commit of {checkpoint} at step {step}: refused, and on record"
    for checkpoint in on_record.keys() - history.commits.keys():
        yield f"commit of {checkpoint}: on record, and nobody asked for it"


def _fenced_meanwhile(commit: Operation, history: _History) -> bool:
    """Whether another consumer may have taken over between the commit and a repetition of it, which was refused."""
    takeovers = [
        takeover
        for takeover in history.of("consume")
        if takeover.answer and takeover.answer["consumer"] > commit.said["consumer"]
    ]
    return commit.error == "Fenced" and all(
        takeover.ended is None or takeover.ended > commit.began for takeover in takeovers
    )


def _takes(history: _History) -> Iterator[str]:
    """Asked again, a step is the same."""
    for (consumer, step), takes in history.takes.items():
        if len({str(take.answer) for take in takes}) > 1:
            yield f"take of step {step} by consumer {consumer}: answered in different ways"


def _steps(history: _History, books: _Books, *, groups_per_step: int, max_staleness: int) -> Iterator[str]:
    """A committed step is full, and what its consumer trained: complete groups, as handed in, within the bound."""
    committed: defaultdict[int, set[_Attempt]] = defaultdict(set)
    for ordinal, row in books.instances.items():
        if row.state == State.COMMITTED:
            committed[row.step or 0].add(_Attempt(ordinal, row.attempt))
    for step in range(1, max([*books.commits, *committed], default=0) + 1):
        if len(committed[step]) != groups_per_step:
            yield f"step {step}: committed with {len(committed[step])} groups of {groups_per_step}"
    for step, groups in committed.items():
        trained = _trained(_take_of(step, history, books))
        if trained.keys() != groups:
            yield f"step {step}: trained {sorted(trained)}, and committed {sorted(groups)}"
        for group, samples in trained.items():
            version = history.handed_in[group].get(samples)
            if version is None:
                yield f"instance {group.ordinal}, attempt {group.attempt}: trained on samples that were not handed in"
            elif (staleness := step - 1 - version) > max_staleness:
                yield f"instance {group.ordinal}: trained {staleness} versions after its oldest token"


def _take_of(step: int, history: _History, books: _Books) -> Operation | None:
    """The take of a step by the consumer that committed it."""
    last = min((committed for committed in books.commits if committed >= step), default=None)
    commits = history.commits.get(books.commits[last], []) if last is not None else []
    takes = history.takes.get((commits[0].said["consumer"], step), []) if commits else []
    return takes[-1] if takes else None


def _trained(take: Operation | None) -> dict[_Attempt, str]:
    groups = take.answer["groups"] if take and take.answer else ()
    return {_Attempt(ordinal, attempt): samples for ordinal, attempt, samples in groups}


def _trained_once(history: _History, books: _Books) -> Iterator[str]:
    """By the consumers' own books: whatever they committed, no group was in two of their steps."""
    done = {
        (operation.said["consumer"], operation.said["step"])
        for operation in history.of("commit")
        if operation.is_ok or books.commits.get(operation.said["step"]) == operation.said["checkpoint"]
    }
    trained: defaultdict[int, list[str]] = defaultdict(list)
    for consumer, last in sorted(done):
        earlier = max((step for _, step in done if step < last), default=0)
        for step in range(earlier + 1, last + 1):
            for group in {group for take in history.takes.get((consumer, step), []) for group in _trained(take)}:
                trained[group.ordinal].append(f"step {step} of consumer {consumer}")
    for ordinal, places in trained.items():
        if len(places) > 1:
            yield f"instance {ordinal}: trained in {' and '.join(places)}"
