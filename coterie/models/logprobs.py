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
    hidden = policy.head_inputs(stream)  # [N, D]
    if not entropy and reference is None:
        found = chunked_logprobs(policy, hidden, stream.targets, temperature=temperature, support=stream.support)
        return TokenStatistics(found)
    reference_hidden = None
    if reference is not None:
        with torch.no_grad():
            reference_hidden = reference.head_inputs(stream)
    head = _Head(policy, reference, temperature, entropy)
    columns = _in_chunks(head, hidden, reference_hidden, stream.targets, stream.support, CHUNK_LOGITS)
    rest = iter(columns[1:])
    return TokenStatistics(columns[0], next(rest) if entropy else None, next(rest) if reference is not None else None)


@section("reference")
@torch.no_grad()
def logprobs_of(policy: Policy, streams: Sequence[Stream], *, temperature: float) -> list[Tensor]:
    """A policy's log-probabilities of each stream's tokens, without gradient: [N] each, on its device."""
    found = []
    for stream in streams:
        may_stop()
        found.append(token_logprobs(policy, stream.to(policy.device), temperature=temperature))
    return found


def chunked_logprobs(
    policy: Policy,
    hidden: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    support: Sequence[Tensor] | None = None,
    chunk_logits: int | None = None,
) -> Tensor:
    """log softmax(head(hidden) / temperature)[targets]: hidden [N, D], targets [N] -> [N]."""
    found = policy.head_logprobs(hidden, targets, temperature) if support is None else None
    if found is not None:
        return found
    return _in_chunks(
        _Head(policy, None, temperature, False), hidden, None, targets, support, chunk_logits or CHUNK_LOGITS
    )[0]


@dataclass(frozen=True)
class _Head:
    """The figures of a chunk, from its hidden states."""

    policy: Policy
    reference: Policy | None
    temperature: float
    entropy: bool

    def __call__(
        self, hidden: Tensor, reference_hidden: Tensor | None, targets: Tensor, support: Sequence[Tensor] | None
    ) -> Tensor:
        """hidden [C, D], targets [C] -> [quantities, C]: log-probability, then entropy, then exact KL."""
        logits = self._logits(self.policy, hidden, support)  # [C, V]
        normaliser = logits.logsumexp(1)
        found = [logits.gather(1, targets[:, None]).squeeze(1) - normaliser]
        if self.entropy:
            probabilities = (logits - normaliser[:, None]).exp()
            found.append(normaliser - (probabilities * logits.masked_fill(logits == -torch.inf, 0.0)).sum(1))
        if self.reference is not None and reference_hidden is not None:
            with torch.no_grad():
                reference_logits = self._logits(self.reference, reference_hidden, support)
            found.append(exact_kl(logits, reference_logits))
        return torch.stack(found)

    def _logits(self, policy: Policy, hidden: Tensor, support: Sequence[Tensor] | None) -> Tensor:
        """The logits that are sampled from: [C, V]."""
        logits = policy.logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if support is None:
            return logits
        sizes = torch.tensor([len(ids) for ids in support])
        rows = torch.repeat_interleave(torch.arange(len(support)), sizes).to(logits.device)
        left_out = torch.ones_like(logits, dtype=torch.bool)
        left_out[rows, torch.cat(list(support)).to(logits.device)] = False
        return logits.masked_fill(left_out, -torch.inf)


def _in_chunks(
    head: _Head,
    hidden: Tensor,
    reference_hidden: Tensor | None,
    targets: Tensor,
    support: Sequence[Tensor] | None,
    chunk_logits: int,
) -> Tensor:
    """The head over chunks of tokens: [quantities, N]."""
    size = max(1, chunk_logits // head.policy.vocabulary_size)
    parts = []
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        allowed = support[part] if support is not None else None
        of_reference = reference_hidden[part] if reference_hidden is not None else None
        inputs = (hidden[part], of_reference, targets[part], allowed)
        if len(targets) > size and torch.is_grad_enabled():
            parts.append(checkpoint(head, *inputs, use_reentrant=False))
        else:
            parts.append(head(*inputs))
    return torch.cat(parts, 1) if parts else hidden.new_zeros(3, 0, dtype=torch.float32)
