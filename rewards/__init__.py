"""Rewards: a plain function of the user's turns a sample into a verdict, in worker processes that can be killed.

A reward function takes the sample, or names the parts it wants, and returns a number, a Score or an Abstain::

    def score(sample): ...              # a RewardInput; a single parameter may have any name
    def score(response, label): ...     # any of its fields, by name
    async def score(sample): ...        # one call at a time in each worker: raise reward.num_workers for slow judges

What goes wrong becomes a Failed, never a number. `rewards.pool` runs the functions, with the run file's folder as the
working directory.
"""

from rewards.inputs import RewardInput
from slime.types import Abstain, Failed, Score, Verdict

__all__ = ["Abstain", "Failed", "RewardInput", "Score", "Verdict"]
