"""The reward of "thinking pays": 1 for the right answer, 0 for any other. Thinking itself earns nothing."""

from slime.types import Score


def score(sample) -> Score:
    """The part ``think`` is not rewarded: it draws the share of answers that think as a curve of its own."""
    words = sample.response.split()
    finished = sample.status == "completed"
    right = finished and words[-2:] == ["answer", sample.label]
    return Score(value=float(right), parts={"think": float(words[:1] == ["think"])})
