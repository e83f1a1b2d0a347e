"""Log-probabilities of the tokens that the policy wrote, computed over the vocabulary in chunks of tokens.

Legend: N completion tokens of a stream, C tokens of a chunk, V vocabulary, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coterie.algorithms.kl import exact_kl
from coterie.models.policy import Policy
from coterie.sections import section
from coterie.stopping import may_stop
from coterie.types import Stream

CHUNK_LOGITS = 1 << 24  # logits held at a time


@dataclass(frozen=True)
class TokenStatistics:
    """Figures of the vocabulary's logits at each token, [N] each, in nats: with gradient where the policy's weights have one.

    entropies: of the distribution that is sampled. exact_kls: KL(policy || reference) over the whole vocabulary. Both None
    where not asked for.
    """

    logprobs: Tensor
    entropies: Tensor | None = None
    exact_kls: Tensor | None = None


def token_logprobs(policy: Policy, stream: Stream, *, temperature: float = 1.0) -> Tensor:
    """The log-probability of each token the policy wrote, under the distribution it is sampled from: [N], in nats.

    Temperature divides the logits, and where the sampler left tokens out (top-k, top-p) the same ones are left out here.
    Logits are held for a chunk only: with gradients on they are computed again in the backward pass.
    """
    return token_statistics(policy, stream, temperature=temperature).logprobs


def token_statistics(
    policy: Policy,
    stream: Stream,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    reference: Policy | None = None,
) -> TokenStatistics:
    """`token_logprobs`, with the entropy, and the exact KL to a reference, from the same pass where they are asked for."""
    head_inputs = policy.head_inputs(stream)  # [N, D]
    beside = None
    if reference is not None:
        with torch.no_grad():
            beside = (reference, reference.head_inputs(stream))
    return head_statistics(
        policy, head_inputs, stream.targets, stream.support, temperature=temperature, entropy=entropy, reference=beside
    )


def head_statistics(
    policy: Policy,
    head_inputs: Tensor,
    targets: Tensor,
    support: Sequence[Tensor] | None = None,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    reference: tuple[Policy, Tensor] | None = None,
) -> TokenStatistics:
    """The statistics of N tokens, targets [N], from what the policy's head takes for each: [N, D]. reference: with its own."""
    if support is None and not entropy and reference is None:
        logprobs = policy.head_logprobs(head_inputs, targets, temperature)
        if logprobs is not None:
            return TokenStatistics(logprobs)
    size = max(1, CHUNK_LOGITS // policy.vocabulary_size)
    chunks = []
    for start in range(0, len(targets) or 1, size):
        part = slice(start, start + size)
        arguments = (
            policy,
            head_inputs[part],
            targets[part],
            support[part] if support is not None else None,
            temperature,
            entropy,
            (reference[0], reference[1][part]) if reference is not None else None,
        )
        if len(targets) > size and torch.is_grad_enabled():
            chunks.append(checkpoint(_chunk_statistics, *arguments, use_reentrant=False))
        else:
            chunks.append(_chunk_statistics(*arguments))
    return TokenStatistics(
        torch.cat([chunk.logprobs for chunk in chunks]),
        torch.cat([chunk.entropies for chunk in chunks]) if entropy else None,
        torch.cat([chunk.exact_kls for chunk in chunks]) if reference is not None else None,
    )


def _chunk_statistics(
    policy: Policy,
    head_inputs: Tensor,
    targets: Tensor,
    support: Sequence[Tensor] | None,
    temperature: float,
    entropy: bool,
    reference: tuple[Policy, Tensor] | None,
) -> TokenStatistics:
    """The same for C tokens, whose logits are held at once."""
    logits = _sampled_logits(policy, head_inputs, support, temperature)  # [C, V]
    normaliser = logits.logsumexp(1)
    logprobs = logits.gather(1, targets[:, None]).squeeze(1) - normaliser
    entropies = exact_kls = None
    if entropy:
        probabilities = (logits - normaliser[:, None]).exp()
        entropies = normaliser - (probabilities * logits.masked_fill(logits == -torch.inf, 0.0)).sum(1)
    if reference is not None:
        with torch.no_grad():
            reference_logits = _sampled_logits(*reference, support, temperature)
        exact_kls = exact_kl(logits, reference_logits)
    return TokenStatistics(logprobs, entropies, exact_kls)


def _sampled_logits(
    policy: Policy, head_inputs: Tensor, support: Sequence[Tensor] | None, temperature: float
) -> Tensor:
    """The logits of the distribution that is sampled from, in float32 at least: [C, V]."""
    logits = policy.logits(head_inputs)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if support is None:
        return logits
    sizes = torch.tensor([len(ids) for ids in support])
    rows = torch.repeat_interleave(torch.arange(len(support)), sizes).to(logits.device)
    left_out = torch.ones_like(logits, dtype=torch.bool)
    left_out[rows, torch.cat(list(support)).to(logits.device)] = False
    return logits.masked_fill(left_out, -torch.inf)


@section("reference")
@torch.no_grad()
def logprobs_of(policy: Policy, streams: Sequence[Stream], *, temperature: float) -> list[Tensor]:
    """A policy's log-probabilities of each stream's tokens, without gradient: [N] each, on its device."""
    found = []
    for stream in streams:
        may_stop()
        found.append(token_logprobs(policy, stream.to(policy.device), temperature=temperature))
    return found
