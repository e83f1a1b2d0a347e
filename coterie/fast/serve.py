"""The parts that the set-up builds a run from: policies and engines that are fast where they give the same as the plain ones.

Two seams hold it: what serves a policy's forward pass (`body_of`, `layout` and `head_logprobs`), and what generates (`make_engine`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from coterie.fast.body import FastBody, count_of
from coterie.fast.half import Halves, has_half_products, head_product
from coterie.fast.half_body import HalfBody
from coterie.fast.half_head import HalfLogprobs
from coterie.fast.native import NativeEngine
from coterie.fast.stream import StreamLayout
from coterie.fast.tiles import TiledLogprobs, plain_head
from coterie.models import load
from coterie.models.attention import AttentionSettings
from coterie.models.codec import Codec
from coterie.models.heads import Scorer
from coterie.models.logprobs import token_logprobs
from coterie.models.policy import Policy as PlainPolicy
from coterie.models.rounding import TIMES, epsilon_of, rounding_of
from coterie.models.template import Chat
from coterie.recipe.settings import Sampling
from coterie.rollouts.engine import Engine
from coterie.rollouts.pack import Row, make_stream
from coterie.rollouts.padded import PaddedEngine

_ALLOWED_GAP = 1e-3  # nats, in float32; a row that lost its keys is off by more


@dataclass(frozen=True)
class Policy(PlainPolicy):
    """A policy with the fast forms of its forward pass: our own of the Llama family, attention that copies no prompt, and logits in
    tiles.

    head_halves: in mixed precision through the model's own layers, the bfloat16 copy of its head.
    """

    head_halves: Halves | None = None

    @classmethod
    def body_of(cls, model: nn.Module, settings: Mapping[int, AttentionSettings]) -> FastBody | None:
        return FastBody.of(model, settings)

    def layout(self, segments: Sequence[tuple[int, Sequence[int]]]) -> StreamLayout:
        return StreamLayout(segments, self.device)

    def in_mixed_precision(self) -> Policy:
        """On a CPU that has products of bfloat16 numbers, in compiled loops; elsewhere in the model's own layers, but for its head."""
        body = HalfBody.beside(self.body) if isinstance(self.body, FastBody) and has_half_products() else None
        return replace(self, mixed=True, body=body, head_halves=Halves() if body is None else None)

    def logits(self, head_inputs: Tensor) -> Tensor:
        head, halves = plain_head(self), self.halves
        if head is None or halves is None or torch.is_grad_enabled():
            return super().logits(head_inputs)
        rows = head_product(
            head_inputs.reshape(-1, head_inputs.shape[-1]), head.weight, halves, slice(0, len(head.weight))
        )
        logits = rows.view(*head_inputs.shape[:-1], -1)
        return logits if head.bias is None else logits + head.bias

    @property
    def halves(self) -> Halves | None:
        """The bfloat16 copies of weights, in mixed precision."""
        return self.body.halves if isinstance(self.body, HalfBody) else self.head_halves

    def head_logprobs(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor | None:
        head = plain_head(self)
        if head is None or not len(targets):
            return None
        hidden = hidden.float() if self.mixed else hidden  # some models end with a product
        count_of([head.weight], len(targets))
        inputs = (hidden, head.weight, head.bias, targets, temperature, self.halves)
        compiled = self.halves is not None and hidden.device.type == "cpu" and has_half_products()
        return HalfLogprobs.apply(*inputs) if compiled else TiledLogprobs.apply(*inputs)


def load_policy(source: str, device: torch.device, chat: Chat | None = None) -> tuple[Policy, Codec]:
    """A model and its tokenizer, ready to sample."""
    source = load.model_folder(source)
    codec = load.codec_of(source, chat=chat)
    return Policy.of(load.load_model(source, device)), codec


def load_scorer(source: str, device: torch.device) -> tuple[Scorer, Codec]:
    """A reward model and its tokenizer. Raises UserError as `check_scorer`."""
    model, codec = load.load_score_model(source, device)
    return Scorer.of(model, Policy), codec


def make_engine(policy: PlainPolicy) -> Engine:
    """The engine that fits how the policy is served: the native one where three tokens that it decodes have the log-probabilities
    that the policy gives them in one pass."""
    if policy.served == "padded":
        return PaddedEngine(policy)
    engine = NativeEngine(policy)
    gap, allowed = _decoding_gap(engine)
    if gap <= allowed:
        return engine
    warnings.warn(
        f"{type(policy.model).__name__} can't be decoded natively (log-probabilities differ by {gap:.2g}); it is sampled through "
        "transformers' own cache, which is slower",
        stacklevel=2,
    )
    return PaddedEngine(policy)


@torch.no_grad()
def _decoding_gap(engine: NativeEngine) -> tuple[float, float]:
    """The largest difference, over two short groups of three tokens a row, between what sampling records and one pass gives, and
    how large it may be: in half precision, what rounding otherwise does."""
    policy, prompts = engine.policy, [[1, 2, 3], [2]]
    if min(policy.vocabulary_size, policy.context_length or 6) < 6:
        return 0.0, 0.0
    made = engine.generate(prompts, torch.arange(4).view(2, 2), Sampling(max_new_tokens=3), [])
    rows = [[Row(one.tokens, one.logprobs) for one in of_prompt] for of_prompt in made]
    stream = make_stream(list(zip(prompts, rows, strict=True))).to(policy.device)
    if epsilon_of(policy) <= torch.finfo(torch.float32).eps:
        again, allowed = token_logprobs(policy, stream), _ALLOWED_GAP
    else:
        plain = replace(policy, body=None)
        again, moved = rounding_of(policy.model, lambda: token_logprobs(plain, stream))
        allowed = max(_ALLOWED_GAP, TIMES * moved.max().item())
    return (again - stream.sampler_logprobs).abs().max().item(), allowed
