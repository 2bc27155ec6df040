"""What a run that continues has in its ledger, brought back into memory."""

from __future__ import annotations

from buffer.leases import Leases
from buffer.ledger import Ledger
from buffer.policy import Policy, Priority, Running, Waiting
from buffer.schema import State


def restore(ledger: Ledger, policy: Policy, leases: Leases) -> None:
    """Give an empty policy every instance that is on its way, and `leases` those that are out.

    Pushed groups to be issued again are dropped on record: nobody here has their prompts.

    Raises:
        LedgerError: an instance would be of another prompt now.
    """
    partial = ledger.partial_ordinals()
    policy.num_committed = ledger.counts()[State.COMMITTED]
    for instance in list(ledger.open_instances()):
        ordinal, attempt = instance.ordinal, instance.attempt
        match instance.state:
            case State.ISSUED if instance.position is None:
                ledger.drop(ordinal, attempt=attempt, reason="its weights are lost, and it came from outside")
            case State.ISSUED:
                leases.check_prompt(instance)
                priority = Priority.PARTIAL if ordinal in partial else Priority.WAITING
                policy.waiting.append(Waiting(priority=priority, ordinal=ordinal, attempt=attempt))
            case State.RUNNING | State.GENERATED:
                leases.check_prompt(instance)
                assert instance.versions is not None
                policy.run(ordinal, Running(attempt=attempt, version=instance.versions.oldest))
                leases.add(leases.make(instance))
            case State.GRADED:
                assert instance.versions is not None
                policy.push(ordinal, versions=instance.versions)
            case _:
                assert instance.step is not None
                policy.packed[ordinal] = instance.step
    policy.waiting.sort()  # sorted, hence a heap
