"""A real SGLang server with a tiny model, compared with transformers."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
import pytest

from rollout.bench import bench_rollout
from rollout.client import GenerationClient, parse_completion
from rollout.engine import SGLangEngine
from rollout.tokenizer import Tokenizer
from slime.config import RolloutConfig
from slime.errors import EngineError
from tests.builders import make_prompt
from tests.rollout.engines import TOKEN, reference_logprobs, stage, tensors_of, wait_for_line, worst

pytestmark = [pytest.mark.stack, pytest.mark.asyncio(loop_scope="module")]

PROMPT = [1, *range(10, 60)]
BF16_NOISE = 0.06
"""Largest difference seen between the engine's BF16 and float32 over these models is 0.03."""


async def test_a_started_engine_has_its_garbage_collector_frozen(engine: tuple[SGLangEngine, str]) -> None:
    """Pins an offload before every step that walks all objects of the scheduler: a fifth of a small step's time."""
    wait_for_line(engine[0]._log_path, "Freezing GC in Scheduler process")  # it hears of it after the server answered


@pytest.mark.parametrize("temperature", [1.0, 0.6])
async def test_logprobs_are_those_of_the_softmax_at_the_sampling_temperature(
    client: GenerationClient, model: Path, temperature: float
) -> None:
    """Pins the behaviour distribution: log-probs of another temperature would bias every importance ratio."""
    completions = await client.generate(PROMPT, max_new_tokens=24, temperature=temperature, num_samples=4)
    for completion in completions:
        expected = reference_logprobs(model, PROMPT, completion.tokens, temperature=temperature)
        assert worst(completion.logprobs, expected) < BF16_NOISE


async def test_the_stop_token_is_part_of_the_response_with_its_logprob(client: GenerationClient, model: Path) -> None:
    """Pins that a policy learns when to stop: without this token no gradient reaches that decision."""
    stops = list(range(20, 128))
    (completion,) = await client.generate(PROMPT, max_new_tokens=64, temperature=1.0, stop_token_ids=stops)
    assert completion.finish_reason == "stop"
    assert completion.tokens[-1] in stops
    assert worst(completion.logprobs, reference_logprobs(model, PROMPT, completion.tokens)) < BF16_NOISE


async def test_a_response_is_cut_at_the_limit_and_says_so(client: GenerationClient) -> None:
    """Pins truncation: a cut answer that looked complete would be graded as one."""
    (completion,) = await client.generate(PROMPT, max_new_tokens=1, temperature=1.0)
    assert (completion.finish_reason, len(completion.tokens)) == ("length", 1)


async def test_temperature_zero_takes_the_most_likely_token(client: GenerationClient) -> None:
    """Pins greedy evaluation."""
    first, second = [(await client.generate(PROMPT, max_new_tokens=12, temperature=0.0))[0].tokens for _ in range(2)]
    assert first == second


async def test_samples_of_a_group_compute_their_prompt_once(client: GenerationClient) -> None:
    """Pins prefix sharing: G samples that each compute a long prompt multiply the cost of generation."""
    completions = await client.generate([7, *PROMPT], max_new_tokens=4, temperature=1.0, num_samples=6)
    assert len(completions) == 6
    assert all(completion.cached_tokens >= len(PROMPT) - 1 for completion in completions)


async def test_published_weights_answer_as_the_other_model_and_under_its_version(
    engine: tuple[SGLangEngine, str], client: GenerationClient, model: Path, other_model: Path, tmp_path: Path
) -> None:
    """Pins publishing: a version whose weights the engine does not hold makes all training off-policy unseen."""
    published = stage(tensors_of(other_model), tmp_path / "other")
    await engine[0].pause()
    await engine[0].load_weights(published, version=7)
    await engine[0].resume()
    (completion,) = await client.generate(PROMPT, max_new_tokens=24, temperature=1.0)
    assert {span.version for span in completion.version_spans} == {7}
    assert completion.cached_tokens == 0, "a prefix computed by the old weights was used"
    assert worst(completion.logprobs, reference_logprobs(other_model, PROMPT, completion.tokens)) < BF16_NOISE
    assert worst(completion.logprobs, reference_logprobs(model, PROMPT, completion.tokens)) > 10 * BF16_NOISE
    await put_back(engine[0], model, tmp_path)


async def test_a_request_in_flight_survives_a_publish_with_a_span_for_each_version(
    engine: tuple[SGLangEngine, str], model: Path, other_model: Path, tmp_path: Path
) -> None:
    """Pins that a publish throws no work away and that staleness is known token by token."""
    await put_back(engine[0], model, tmp_path)
    published = stage(tensors_of(other_model), tmp_path / "other")
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session:
        parameters = {"max_new_tokens": 300, "temperature": 1.0, "ignore_eos": True}
        body = {"input_ids": PROMPT, "sampling_params": parameters, "return_logprob": True, "stream": True}
        async with session.post(engine[1] + "/generate", json=body) as response:
            assert (await response.content.readline()).startswith(b"data:")
            await engine[0].pause()
            await engine[0].load_weights(published, version=9)
            await engine[0].resume()
            events = [line async for line in response.content if line.startswith(b"data: {")]
    completion = parse_completion(json.loads(events[-1][5:]), url=engine[1], max_new_tokens=300)
    old, new = completion.version_spans
    assert (old.version, new.version, new.end) == (0, 9, 300)
    after = completion.tokens[new.start :]
    expected = reference_logprobs(other_model, [*PROMPT, *completion.tokens[: new.start]], after)
    assert worst(completion.logprobs[new.start :], expected) < BF16_NOISE
    await put_back(engine[0], model, tmp_path)


async def test_damaged_or_incomplete_weights_are_refused_and_the_engine_does_not_resume(
    engine: tuple[SGLangEngine, str], client: GenerationClient, model: Path, tmp_path: Path
) -> None:
    """Pins that a half-loaded engine never answers, and that good weights heal it."""
    tensors = tensors_of(model)
    damaged = stage(tensors, tmp_path / "damaged")
    blob = tmp_path / "damaged" / "weights.bin"
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    missing = stage({name: t for name, t in tensors.items() if "k_proj" not in name}, tmp_path / "missing")
    unknown = stage({**tensors, "model.layers.0.mlp.extra": tensors["model.norm.weight"]}, tmp_path / "unknown")
    for manifest, reason in [(damaged, "checksum"), (missing, "qkv_proj"), (unknown, "mlp.extra")]:
        await engine[0].pause()
        with pytest.raises(EngineError, match=reason):
            await engine[0].load_weights(manifest, version=5)
        with pytest.raises(EngineError, match="cannot resume"):
            await engine[0].resume()
    await put_back(engine[0], model, tmp_path)
    (completion,) = await client.generate(PROMPT, max_new_tokens=8, temperature=1.0)
    assert {span.version for span in completion.version_spans} == {0}
    assert worst(completion.logprobs, reference_logprobs(model, PROMPT, completion.tokens)) < BF16_NOISE


@pytest.mark.parametrize("path", ["/generate", "/pause_generation", "/update_weights_from_tensor", "/flush_cache"])
async def test_every_endpoint_wants_the_token(engine: tuple[SGLangEngine, str], path: str) -> None:
    """Pins that nobody else on the machine can pause the engine or replace its weights."""
    async with aiohttp.ClientSession() as session, session.post(engine[1] + path, json={}) as response:
        assert response.status == 401


async def test_the_token_is_neither_in_the_log_nor_on_a_command_line(engine: tuple[SGLangEngine, str]) -> None:
    """Pins that the run's token stays secret: SGLang logs its arguments, and any user can list command lines."""
    assert "server_args=" in engine[0]._log_path.read_text()
    assert TOKEN not in engine[0]._log_path.read_text()
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(TOKEN.encode() in line for line in lines)


async def test_the_client_names_an_engine_that_refuses(engine: tuple[SGLangEngine, str]) -> None:
    """Pins that a refusal is an error with its reason, not an empty sample."""
    async with GenerationClient([engine[1]], token="another", timeout_s=30) as stranger:
        with pytest.raises(EngineError, match=rf"{engine[1]}.*401"):
            await stranger.generate(PROMPT, max_new_tokens=4, temperature=1.0)


async def test_the_bench_measures_both_paths(engine: tuple[SGLangEngine, str], model: Path) -> None:
    """Pins what `slime bench rollout` divides: two positive rates of the same work."""
    bench = await bench_rollout(
        engine[1],
        token=TOKEN,
        tokenizer=Tokenizer(str(model)),
        prompts=[make_prompt(f"p{i}", text=f"{i} + 2 =") for i in range(4)],
        config=RolloutConfig(samples_per_prompt=2, max_response_tokens=8),
        repeats=1,
    )
    assert bench.ratio == pytest.approx(bench.rollout_tokens_per_s / bench.bare_tokens_per_s)
    assert bench.bare_tokens_per_s > 0


async def put_back(engine: SGLangEngine, model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "first"
    manifest = str(directory / "manifest.json") if directory.exists() else stage(tensors_of(model), directory)
    await engine.pause()
    await engine.load_weights(manifest, version=0)
    await engine.resume()
