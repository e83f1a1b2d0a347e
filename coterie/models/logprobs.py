"""Log-probabilities of the tokens that the policy wrote, computed over the vocabulary in chunks of tokens.

Legend: N completion tokens of a stream, C tokens of a chunk, V vocabulary, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coterie.algorithms.kl import exact_kl
from coterie.models.policy import Policy
from coterie.sections import section
from coterie.stopping import may_stop
from coterie.types import Stream

CHUNK_LOGITS = 1 << 24  # logits held at a time
# Of a plain head: logits of a tile, and how many of the vocabulary it covers
TILE_LOGITS = {"cpu": (1 << 20, 2048), "cuda": (1 << 24, 8192)}


@dataclass(frozen=True)
class TokenStatistics:
    """What the vocabulary's logits say at each token, [N] each, in nats: with gradient where the policy's weights have one.

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
    hidden = policy.hidden_states(stream)  # [N, D]
    reference_hidden = None
    if reference is not None:
        with torch.no_grad():
            reference_hidden = reference.hidden_states(stream)
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
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """log softmax(head(hidden) / temperature)[targets]: hidden [N, D], targets [N] -> [N]."""
    return _in_chunks(_Head(policy, None, temperature, False), hidden, None, targets, support, chunk_logits)[0]


@dataclass(frozen=True)
class _Head:
    """What is computed from the hidden states of a chunk."""

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
    plain = head.policy.plain_head if support is None and head.reference is None and not head.entropy else None
    if plain is not None and len(targets):
        return _TiledLogprobs.apply(hidden, plain.weight, plain.bias, targets, head.temperature)[None]
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


class _TiledLogprobs(torch.autograd.Function):
    """log softmax(head(hidden) / temperature)[targets], [N], for a head that is one product: hidden [N, D], weight [V, D].

    A tile is some tokens by some of the vocabulary, small enough to stay in a CPU's cache for all that is done to it: with a
    large vocabulary, passing over logits in memory costs more than the products. The normalisers are summed from tile to tile; in the
    backward pass a tile's logits are computed again and turned into their gradient in place.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> Tensor:
        tiles = _Tiles(weight, bias, temperature)
        chosen, normaliser = hidden.new_zeros(len(hidden)), hidden.new_empty(len(hidden))
        for rows in tiles.rows(len(hidden)):
            largest = hidden.new_full((len(hidden[rows]),), -torch.inf)
            total = torch.zeros_like(largest)
            for columns in tiles.columns:
                logits = tiles.logits(hidden[rows], columns)
                at, inside = tiles.places(targets[rows], columns)
                chosen[rows] += logits.gather(1, at)[:, 0].where(inside, 0)
                before, largest = largest, torch.maximum(largest, logits.amax(1))
                total = total * (before - largest).exp() + logits.sub_(largest[:, None]).exp_().sum(1)
            normaliser[rows] = largest + total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        ctx.temperature = temperature
        return chosen - normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        tiles = _Tiles(weight, bias, ctx.temperature)
        grad = grads[0] / ctx.temperature
        of_hidden = torch.zeros_like(hidden)
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        for rows in tiles.rows(len(hidden)):
            for columns in tiles.columns:
                at, inside = tiles.places(targets[rows], columns)
                of_logits = (
                    tiles.logits(hidden[rows], columns).sub_(normaliser[rows, None]).exp_().mul_(-grad[rows, None])
                )
                of_logits.scatter_add_(1, at, grad[rows].where(inside, 0)[:, None])
                of_hidden[rows].addmm_(of_logits, weight[columns])
                if of_weight is not None:
                    of_weight[columns].addmm_(of_logits.t(), hidden[rows])
                if of_bias is not None:
                    of_bias[columns] += of_logits.sum(0)
        return of_hidden, of_weight, of_bias, None, None


class _Tiles:
    """A head's logits, a tile at a time."""

    def __init__(self, weight: Tensor, bias: Tensor | None, temperature: float) -> None:
        size, width = TILE_LOGITS["cpu" if weight.device.type == "cpu" else "cuda"]
        width = min(width, len(weight))
        self._weight, self._bias, self._temperature = weight, bias, temperature
        self._size = max(1, size // width)
        self.columns = [slice(start, start + width) for start in range(0, len(weight), width)]

    def rows(self, tokens: int) -> list[slice]:
        return [slice(start, start + self._size) for start in range(0, tokens, self._size)]

    def logits(self, hidden: Tensor, columns: slice) -> Tensor:
        bias = self._bias[columns] if self._bias is not None else None
        logits = F.linear(hidden, self._weight[columns], bias)
        return logits if self._temperature == 1 else logits.div_(self._temperature)

    def places(self, targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Where the targets stand among these columns, [C, 1], and which do, [C]: the others' places mean nothing."""
        stop = min(columns.stop, len(self._weight))
        inside = (targets >= columns.start) & (targets < stop)
        return (targets.clamp(columns.start, stop - 1) - columns.start)[:, None], inside
