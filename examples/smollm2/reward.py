"""The reward of the sums: 1 if the last whole number of a finished answer is the right one, else 0."""

import re

from slime.types import Score

WHOLE_NUMBER = re.compile(r"-?\d+")


def score(sample) -> Score:
    """What the model wrote is compared as text and never evaluated. The part ``finished`` is logged, not rewarded."""
    finished = sample.status == "completed"
    numbers = WHOLE_NUMBER.findall(sample.response)
    right = finished and numbers[-1:] == [sample.label]
    return Score(value=float(right), parts={"finished": float(finished)})
