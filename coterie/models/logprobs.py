"""Log-probabilities of the tokens that the policy wrote, computed over the vocabulary in chunks of tokens.

Legend: N completion tokens of a stream, C tokens of a chunk, V vocabulary, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coterie.models.policy import Policy
from coterie.types import Stream

CHUNK_LOGITS = 1 << 24  # logits held at a time


def token_logprobs(policy: Policy, stream: Stream, *, temperature: float = 1.0) -> Tensor:
    """The log-probability of each token the policy wrote, under the distribution it is sampled from: [N], in nats.

    Temperature divides the logits, and where the sampler left tokens out (top-k, top-p) the same ones are left out here.
    Logits are held for a chunk only: with gradients on they are computed again in the backward pass.
    """
    hidden = policy.hidden_states(stream)  # [N, D]
    return chunked_logprobs(policy, hidden, stream.targets, temperature=temperature, support=stream.support)


def chunked_logprobs(
    policy: Policy,
    hidden: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    support: Sequence[Tensor] | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """log softmax(head(hidden) / temperature)[targets]: hidden [N, D], targets [N] -> [N]."""
    size = max(1, chunk_logits // policy.vocabulary_size)
    parts = []
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        allowed = support[part] if support is not None else None
        inputs = (policy, hidden[part], targets[part], temperature, allowed)
        if len(targets) > size and torch.is_grad_enabled():
            parts.append(checkpoint(_chunk_logprobs, *inputs, use_reentrant=False))
        else:
            parts.append(_chunk_logprobs(*inputs))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _chunk_logprobs(
    policy: Policy, hidden: Tensor, targets: Tensor, temperature: float, support: Sequence[Tensor] | None
) -> Tensor:
    """hidden [C, D], targets [C] -> [C]."""
    logits = policy.logits(hidden).float() / temperature  # [C, V]
    if support is not None:
        sizes = torch.tensor([len(ids) for ids in support])
        rows = torch.repeat_interleave(torch.arange(len(support)), sizes).to(logits.device)
        left_out = torch.ones_like(logits, dtype=torch.bool)
        left_out[rows, torch.cat(list(support)).to(logits.device)] = False
        logits = logits.masked_fill(left_out, -torch.inf)
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)
