"""Entropy and the exact KL from the same pass as the log-probabilities."""

import pytest
import torch
from small_streams import DEVICE

from coterie.fast.serve import Policy
from coterie.models import logprobs
from coterie.models.logprobs import token_statistics
from coterie.rollouts.pack import Row, make_stream

GROUPS = [([3, 4, 5], [[6, 7], [8, 9, 10, 11], [12]]), ([13], [[14, 15, 16]])]


def stream(support=None):
    def row(tokens):
        return Row(tokens, torch.zeros(len(tokens)), support=support and [torch.tensor([*support, t]) for t in tokens])

    return make_stream([(prompt, [row(c) for c in completions]) for prompt, completions in GROUPS]).to(DEVICE)


def tables(policy, temperature, support):
    """log-softmax over the vocabulary before each token, the slow way: [N, V], -inf where it can't be sampled."""
    rows = []
    for prompt, completions in GROUPS:
        for completion in completions:
            logits = policy.model(torch.tensor([prompt + completion], device=DEVICE)).logits[0].double() / temperature
            for n, token in enumerate(completion):
                at = logits[len(prompt) + n - 1]
                if support:
                    kept = torch.full_like(at, -torch.inf)
                    kept[[*support, token]] = 0
                    at = at + kept
                rows.append(at.log_softmax(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("support", [None, [1, 2, 30]])
@pytest.mark.parametrize("chunk", [1 << 24, 61 * 3])
def test_entropy_and_exact_kl_with_every_gradient(make_model, monkeypatch, support, chunk):
    """In chunks of three tokens, and whole; with tokens left out by the sampler, and without."""
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", chunk)
    policy, reference = Policy.of(make_model("llama")), Policy.of(make_model("llama", initializer_range=0.3))
    found = token_statistics(policy, stream(support), temperature=0.8, entropy=True, reference=reference)
    ours = tables(policy, 0.8, support)
    with torch.no_grad():
        theirs = tables(reference, 0.8, support)
    possible = ours > -torch.inf
    logs, others = ours.masked_fill(~possible, 0), theirs.masked_fill(~possible, 0)
    probabilities = ours.exp() * possible
    entropies, kls = -(probabilities * logs).sum(1), (probabilities * (logs - others)).sum(1)
    torch.testing.assert_close(found.entropies, entropies.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.exact_kls, kls.float(), rtol=1e-4, atol=1e-5)
    assert kls.min() > 1e-4
    parameters = list(policy.model.parameters())
    weights = torch.linspace(-1, 1, len(kls), device=DEVICE)
    expected = torch.autograd.grad(((entropies + 2 * kls) * weights).sum(), parameters)
    got = torch.autograd.grad(((found.entropies + 2 * found.exact_kls) * weights).sum(), parameters)
    for ours_of, theirs_of in zip(got, expected, strict=True):
        torch.testing.assert_close(ours_of, theirs_of.float(), rtol=1e-3, atol=1e-5)


def test_what_is_not_asked_for_is_not_there(make_model):
    found = token_statistics(Policy.of(make_model("llama")), stream())
    assert found.entropies is None
    assert found.exact_kls is None
