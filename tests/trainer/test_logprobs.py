"""token_logprobs against float64."""

import pytest
import torch

from trainer import logprobs as module
from trainer.logprobs import token_logprobs


@pytest.mark.parametrize("num_words", [7, 192, 49152])
def test_values_and_gradients_equal_float64(num_words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins a chunk boundary that drops rows, a temperature applied twice or not in the gradient, a wrong entropy."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * num_words * 3)  # chunks of three rows
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(10, num_words, generator=g) * 5).requires_grad_()
    targets = torch.randint(0, num_words, (10,), generator=g)
    temperatures = torch.rand(10, generator=g) + 0.5
    weights, entropy_weights = torch.randn(10, generator=g), torch.randn(10, generator=g)

    logprobs, entropy = token_logprobs(logits, targets, temperatures)
    (weights @ logprobs + entropy_weights @ entropy).backward()

    exact = logits.detach().double().requires_grad_()
    log_p = torch.log_softmax(exact / temperatures.double()[:, None], dim=-1)
    exact_logprobs, exact_entropy = log_p[range(10), targets], -(log_p.exp() * log_p).sum(-1)
    (weights.double() @ exact_logprobs + entropy_weights.double() @ exact_entropy).backward()

    torch.testing.assert_close(logprobs.double(), exact_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=1e-5)
    assert exact.grad is not None
    assert logits.grad is not None
    assert (logits.grad - exact.grad).norm() < 1e-5 * exact.grad.norm()


def test_bf16_logits_are_computed_in_fp32_and_get_bf16_gradients() -> None:
    """Pins a softmax in bf16, which is off by a hundredth."""
    g = torch.Generator().manual_seed(1)
    logits = (torch.randn(6, 300, generator=g) * 5).bfloat16().requires_grad_()
    targets, ones = torch.randint(0, 300, (6,), generator=g), torch.ones(6)
    logprobs, entropy = token_logprobs(logits, targets, ones)
    logprobs.sum().backward()
    exact = torch.log_softmax(logits.detach().double(), dim=-1)[range(6), targets]
    assert (logprobs.dtype, entropy.dtype) == (torch.float32, torch.float32)
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_for_the_backward_pass_but_the_logits_and_vectors() -> None:
    """Pins a saved softmax: with a real vocabulary it is larger than the rest of the activations."""
    saved: list[torch.Tensor] = []
    logits = torch.randn(50, 1000).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        token_logprobs(logits, torch.zeros(50, dtype=torch.long), torch.ones(50))
    large = [t for t in saved if t.numel() > 50]
    assert [t.data_ptr() for t in large] == [logits.data_ptr()]
