"""Make the data and the model of "thinking pays": sums such as ``3 + 4 - 2 =`` and a tiny model that is new to them.

The model first sees worked examples (``slime sft``). Some think step by step; most blurt out an answer, right half of
the time. Nothing in them says that thinking is better: reinforcement learning has to find that out.

    python examples/reasoning/prepare.py --seed 0

writes, below ``--output`` (by default the folder of this file):

    data/train.jsonl    problems with their answers; slime itself sets the held-out ones apart
    data/sft.jsonl      worked examples, of training problems only
    model/random/       a Qwen3 of 0.4 M parameters with random weights and a tokenizer of whole numbers
"""

from __future__ import annotations

import argparse
import json
import random
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NUM_TERMS = (3, 4, 5, 6)
LARGEST_TOTAL = 20
"""Running totals stay in 0..20: each step is then one of a few hundred facts, which a tiny model can learn."""
THINK_SHARE = 0.4
SLIP_SHARE = 0.05
"""Share of steps in the examples that are off by one, so that even thinking leaves something to improve."""
BLIND_RIGHT_SHARE = 0.5
SPECIAL = ("<pad>", "<s>", "<e>")
WORDS = (*SPECIAL, *map(str, range(-10, 31)), "+", "-", "=", ";", "think", "answer")
"""The vocabulary. Digits would have to be copied one by one, which a model this small learns late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A chain of one-digit terms."""

    terms: tuple[int, ...]
    operators: tuple[str, ...]

    @property
    def text(self) -> str:
        rest = (f"{op} {term}" for op, term in zip(self.operators, self.terms[1:], strict=True))
        return f"{self.terms[0]} {' '.join(rest)} ="

    @property
    def totals(self) -> list[int]:
        """The running total after each operator."""
        totals = [self.terms[0]]
        for op, term in zip(self.operators, self.terms[1:], strict=True):
            totals.append(totals[-1] + term if op == "+" else totals[-1] - term)
        return totals[1:]


def draw(rng: random.Random) -> Problem:
    """One problem whose totals stay in range."""
    while True:
        num_terms = rng.choice(NUM_TERMS)
        terms = tuple(rng.randint(0, 9) for _ in range(num_terms))
        problem = Problem(terms=terms, operators=tuple(rng.choice("+-") for _ in terms[1:]))
        if all(0 <= total <= LARGEST_TOTAL for total in problem.totals):
            return problem


def draw_distinct(num: int, *, rng: random.Random) -> list[Problem]:
    problems: dict[Problem, None] = {}
    while len(problems) < num:
        problems[draw(rng)] = None
    return list(problems)


def think(problem: Problem, *, rng: random.Random) -> str:
    """Step by step, carrying on from each total as written; some steps slip by one."""
    steps, total = [], problem.terms[0]
    for op, term in zip(problem.operators, problem.terms[1:], strict=True):
        result = total + term if op == "+" else total - term
        if rng.random() < SLIP_SHARE:
            result = min(max(result + rng.choice((-1, 1)), 0), LARGEST_TOTAL)
        steps.append(f"{total} {op} {term} = {result} ;")
        total = result
    return f"think {' '.join(steps)} answer {total}"


def blurt(problem: Problem, *, rng: random.Random) -> str:
    """The answer alone: right half of the time, else near it."""
    miss = 0 if rng.random() < BLIND_RIGHT_SHARE else rng.randint(-9, 9)
    return f"answer {problem.totals[-1] + miss}"


def examples(problems: Sequence[Problem], num: int, *, rng: random.Random) -> Iterator[dict[str, str]]:
    """`num` rows for `slime sft`."""
    for _ in range(num):
        problem = rng.choice(problems)
        respond = think if rng.random() < THINK_SHARE else blurt
        yield {"text": problem.text, "response": respond(problem, rng=rng)}


def write_tokenizer(directory: Path) -> None:
    """One token a word, ``<s>`` before every plain text, no chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", WORDS.index("<s>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<e>",
        unk_token="<pad>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)


def write_model(directory: Path, *, seed: int) -> None:
    """A Hugging Face directory with random BF16 weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=WORDS.index("<pad>"),
        bos_token_id=WORDS.index("<s>"),
        eos_token_id=WORDS.index("<e>"),
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    write_tokenizer(directory)


def write_data(directory: Path, *, num_problems: int, num_examples: int, rng: random.Random) -> None:
    """``train.jsonl``, and ``sft.jsonl`` from those of its problems that slime will not hold out for evaluation."""
    from buffer.prompts.split import load_split
    from slime.config import DataConfig

    directory.mkdir(parents=True, exist_ok=True)
    problems = {problem.text: problem for problem in draw_distinct(num_problems, rng=rng)}
    train = directory / "train.jsonl"
    write_rows(
        train,
        (
            {"text": text, "label": str(problem.totals[-1]), "tags": [f"{len(problem.terms)} terms"]}
            for text, problem in problems.items()
        ),
    )
    held_out = tomllib.loads((HERE / "run.toml").read_text())["data"]["held_out"]
    (seen,) = load_split(DataConfig(train=train, held_out=held_out)).train
    write_rows(directory / "sft.jsonl", examples([problems[prompt.text] for prompt in seen], num_examples, rng=rng))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(output: Path, *, seed: int, num_problems: int = 12_000, num_examples: int = 38_400) -> None:
    """Everything, a function of `seed` alone. 38,400 examples are 600 steps of 64."""
    write_data(
        output / "data", num_problems=num_problems, num_examples=num_examples, rng=random.Random(f"reasoning {seed}")
    )
    write_model(output / "model" / "random", seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE, help="folder for data/ and model/")
    arguments = parser.parse_args()
    prepare(arguments.output, seed=arguments.seed)
    print(f"wrote {arguments.output / 'data'} and {arguments.output / 'model'}")


if __name__ == "__main__":
    main()
