"""From prompts to groups of completions: keyed noise in, text out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from coterie.models.codec import Codec
from coterie.models.logprobs import token_logprobs
from coterie.models.policy import Policy
from coterie.models.rounding import TIMES, rounding_of
from coterie.noise import key, mix
from coterie.recipe.settings import Sampling
from coterie.rollouts.engine import Engine
from coterie.rollouts.native import NativeEngine
from coterie.rollouts.pack import Row, make_stream
from coterie.rollouts.padded import PaddedEngine
from coterie.sections import section
from coterie.types import Completion, Group, Prompt

_ALLOWED_GAP = 1e-3  # nats, in float32; a row that lost its keys is off by more


def make_engine(policy: Policy) -> Engine:
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
    if policy.model.dtype in (torch.float32, torch.float64):
        again, allowed = token_logprobs(policy, stream), _ALLOWED_GAP
    else:
        again, moved = rounding_of(policy.model, lambda: token_logprobs(policy, stream))
        allowed = max(_ALLOWED_GAP, TIMES * moved.max().item())
    return (again - stream.sampler_logprobs).abs().max().item(), allowed


@section("sample")
def collect(
    engine: Engine,
    prompts: Sequence[Prompt],
    codec: Codec,
    sampling: Sampling,
    *,
    num_completions: int,
    noise: tuple[int | str, ...],
    begin: Callable[[Group], None] | None = None,
) -> list[Group]:
    """Sample a group for each prompt. The noise of a token depends on `noise` (seed, purpose, step), the prompt's key, the
    completion's number and the token's, and on nothing else. `begin` gets each group as soon as it is whole."""
    of_prompt = mix(torch.tensor(key(*noise)), torch.tensor([prompt.key for prompt in prompts]))
    keys = mix(of_prompt[:, None], torch.arange(num_completions))  # [P, G]
    groups: dict[int, Group] = {}

    def add(number: int, completions: Sequence[Completion]) -> None:
        groups[number] = Group(prompts[number], [_with_text(one, codec, sampling.stop) for one in completions])
        if begin is not None:
            begin(groups[number])

    tokens = [prompt.tokens for prompt in prompts]
    made = engine.generate(tokens, keys, sampling, codec.end_tokens, codec.decode, add if begin is not None else None)
    for number, completions in enumerate(made):
        if number not in groups:
            add(number, completions)
    return [groups[number] for number in range(len(prompts))]


def _with_text(completion: Completion, codec: Codec, stop: Sequence[str]) -> Completion:
    """The text, without what ended it: an end token, or a stop string and what its last token wrote after it."""
    ends = completion.tokens[-1] in codec.end_tokens
    text = codec.decode(completion.tokens[:-1] if ends else completion.tokens)
    if completion.ended == "stop" and not ends:
        text = text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]
    return replace(completion, text=text)
