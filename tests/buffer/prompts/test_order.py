"""The order of training is a function of the seed, and costs the same at any position."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.prompts.dataset import prompt_uid
from buffer.prompts.order import PromptOrder, permuted
from slime.config import MIXTURE_SLOTS
from slime.errors import DataError
from slime.types import Prompt

UNHURRIED = settings(deadline=None, max_examples=50)


def prompts(count: int, *, name: str = "") -> list[Prompt]:
    return [Prompt(uid=prompt_uid(text=f"{name}{i} + 1 ="), text=f"{name}{i} + 1 =") for i in range(count)]


@UNHURRIED
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_every_place_has_one_image(size: int, key: int) -> None:
    """Pins: prompts that an epoch leaves out or visits twice."""
    assert sorted(permuted(place, size=size, key=key) for place in range(size)) == list(range(size))


@given(size=st.integers(1, 2**40), key=st.integers(0, 2**64 - 1), place=st.integers(0, 2**40))
def test_images_stay_in_range_at_any_size(size: int, key: int, place: int) -> None:
    """Pins: an index past the end of a file too large for any other test."""
    assert 0 <= permuted(place % size, size=size, key=key) < size


def test_all_orders_of_a_few_prompts_occur_about_equally_often() -> None:
    """Pins: a permutation that hardly permutes. 4! = 24 orders by 4,800 keys; 5 standard deviations."""
    orders = Counter(tuple(permuted(place, size=4, key=key) for place in range(4)) for key in range(4800))
    assert len(orders) == 24
    assert all(abs(count - 200) < 5 * 200**0.5 for count in orders.values())


def test_neighbours_end_up_anywhere() -> None:
    """Pins: an epoch that keeps the file's neighbourhoods: the distances are those of places drawn at random."""
    size = 100_000
    images = [permuted(place, size=size, key=5) for place in range(2000)]
    distances = [abs(one - other) for one, other in itertools.pairwise(images)]
    assert abs(sum(distances) / len(distances) / size - 1 / 3) < 5 * (1 / 18 / len(distances)) ** 0.5


def test_each_epoch_visits_every_prompt_once_in_an_order_of_its_own() -> None:
    """Pins: an order that repeats each epoch, or drops and doubles prompts at the seam of two epochs."""
    order = PromptOrder(prompts(50), seed=3)
    visited = [order.prompt_at(position) for position in range(150)]
    for epoch in range(3):
        part = visited[epoch * 50 : (epoch + 1) * 50]
        assert {number for number, _ in part} == {epoch}
        assert Counter(prompt.uid for _, prompt in part) == Counter(prompt.uid for prompt in prompts(50))
    orders = {tuple(prompt.uid for _, prompt in visited[start : start + 50]) for start in (0, 50, 100)}
    assert len(orders) == 3


def test_the_order_depends_on_the_seed_and_not_on_who_asked_before() -> None:
    """Pins: a continued run that visits other prompts than the one that was not stopped."""
    straight = [PromptOrder(prompts(50), seed=3).prompt_at(position) for position in range(150)]
    jumping = PromptOrder(prompts(50), seed=3)
    asked = list(range(150))
    random.Random(2).shuffle(asked)
    found = {position: jumping.prompt_at(position) for position in asked}
    assert [found[position] for position in range(150)] == straight
    other = PromptOrder(prompts(50), seed=4)
    assert [other.prompt_at(position) for position in range(50)] != straight[:50]


def test_the_order_stays_what_it_is() -> None:
    """Pins: a run that a newer slime continues in another order. The network once more, on bits as text."""

    def mix(value: int) -> int:
        mask = 2**64 - 1
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    def image(place: int, key: int) -> int:
        """20 prompts: 5 bits, of which the first 3 are the high ones."""
        bits = f"{place:05b}"
        high, low = bits[:3], bits[3:]
        for number in range(8):
            if number % 2 == 0:
                high = f"{int(high, 2) ^ int(f'{mix(int(low, 2) ^ mix(key + number)):064b}'[-3:], 2):03b}"
            else:
                low = f"{int(low, 2) ^ int(f'{mix(int(high, 2) ^ mix(key + number)):064b}'[-2:], 2):02b}"
        found = int(high + low, 2)
        return found if found < 20 else image(found, key)

    seed, source, epoch = 7, 0, 1
    key = mix(mix(mix(seed) + source) + epoch)
    order = PromptOrder(prompts(20), seed=seed)
    expected = [prompts(20)[image(place, key)] for place in range(20)]
    assert [order.prompt_at(20 + place)[1] for place in range(20)] == expected
    assert mix(0) == 0xE220A8397B1DCDAF, "the first output of the published generator for seed 0"


def test_unshuffled_prompts_come_as_they_are_given() -> None:
    order = PromptOrder(prompts(3), seed=1, shuffle=False)
    assert [order.prompt_at(position)[1].text for position in range(4)] == [
        "0 + 1 =",
        "1 + 1 =",
        "2 + 1 =",
        "0 + 1 =",
    ]


@UNHURRIED
@given(
    weights=st.lists(st.floats(0.05, 1), min_size=2, max_size=12),
    start=st.integers(0, 5000),
    seed=st.integers(0, 2**32),
    shuffle=st.booleans(),
)
def test_sources_take_turns_by_their_weights(weights: list[float], start: int, seed: int, shuffle: bool) -> None:
    """Pins: a small source that is drawn by its size, or all at once: shares hold to one turn in every cycle."""
    sources = [prompts(3, name=f"source {number}: ") for number in range(len(weights))]
    order = PromptOrder(*sources, seed=seed, shuffle=shuffle, weights=weights)
    visited = [order.prompt_at(position)[1].text for position in range(start, start + MIXTURE_SLOTS)]
    turns = Counter(int(text.split()[1].removesuffix(":")) for text in visited)
    for number, weight in enumerate(weights):
        assert abs(turns[number] - weight / sum(weights) * MIXTURE_SLOTS) < 1


def test_turns_are_spread_evenly() -> None:
    """Pins: a mixture whose steps are all of one source: each run of ten has its share, give or take one."""
    order = PromptOrder(prompts(7), prompts(9, name="x"), seed=0, weights=[1, 4])
    visited = [order.prompt_at(position)[1].text.startswith("x") for position in range(3 * MIXTURE_SLOTS)]
    assert {sum(visited[start : start + 10]) for start in range(len(visited) - 10)} <= {7, 8, 9}


def test_each_source_has_epochs_of_its_own() -> None:
    """Pins: a small source whose prompts are not all visited before any comes again."""
    small, large = prompts(5, name="small "), prompts(40, name="large ")
    order = PromptOrder(small, large, seed=1)
    for source, name in ((small, "small"), (large, "large")):
        visited = [order.prompt_at(position) for position in range(160)]
        mine = [(epoch, prompt) for epoch, prompt in visited if prompt.text.startswith(name)]
        assert [epoch for epoch, _ in mine] == [turn // len(source) for turn in range(80)]
        for epoch in range(80 // len(source)):
            assert Counter(prompt.uid for number, prompt in mine if number == epoch) == Counter(
                prompt.uid for prompt in source
            )


def test_the_fingerprint_changes_exactly_when_a_position_may() -> None:
    """Pins: a run continued over other prompts, whose positions then name other problems than those recorded."""
    one = PromptOrder(prompts(20), seed=1).fingerprint
    assert PromptOrder(prompts(20), seed=1).fingerprint == one
    assert PromptOrder(prompts(21), seed=1).fingerprint != one
    assert PromptOrder(prompts(20), seed=2).fingerprint != one
    unshuffled = PromptOrder(prompts(20), seed=1, shuffle=False).fingerprint
    assert unshuffled != one
    assert PromptOrder(prompts(20)[::-1], seed=1, shuffle=False).fingerprint != unshuffled
    assert PromptOrder(prompts(20), seed=2, shuffle=False).fingerprint == unshuffled
    several = PromptOrder(prompts(20), prompts(9), seed=1, weights=[1, 2]).fingerprint
    assert PromptOrder(prompts(20), prompts(9), seed=1, weights=[2, 4]).fingerprint == several
    assert PromptOrder(prompts(20), prompts(9), seed=1, weights=[1, 3]).fingerprint != several
    assert PromptOrder(prompts(20), prompts(8), seed=1, weights=[1, 2]).fingerprint != several


def test_an_order_of_nothing_is_refused() -> None:
    for sources in ([], [[]], [prompts(2), []]):
        with pytest.raises(DataError, match="no prompts to order"):
            PromptOrder(*sources, seed=0)
