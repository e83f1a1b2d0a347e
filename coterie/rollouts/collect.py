"""From prompts to groups of completions: keyed noise in, text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from coterie.models.codec import Codec
from coterie.noise import key, mix
from coterie.recipe.settings import Sampling
from coterie.rollouts.engine import Engine
from coterie.sections import section
from coterie.types import Completion, Group, Prompt


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
