"""The slow engine, for architectures that can't share a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coterie.models.policy import Policy
from coterie.rollouts.engine import Done, History, StopStrings, sample_tokens
from coterie.sections import section
from coterie.settings import Sampling
from coterie.stopping import may_stop
from coterie.types import Completion


class PaddedEngine:
    """Samples one group after another, through transformers' own cache.

    A model without a key-value cache is run on the whole sequence for every token.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def load_weights(self, policy: Policy, version: int) -> None:
        self.policy = policy

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Tensor,
        sampling: Sampling,
        end_tokens: Sequence[int],
        decode: Callable[[Sequence[int]], str] | None = None,
        done: Done | None = None,
    ) -> list[list[Completion]]:
        """See `Engine`."""
        model, device = self.policy.model, self.policy.device
        num_completions = keys.shape[1]
        keys, ends = keys.to(device), torch.tensor(list(end_tokens), device=device)
        stops = StopStrings.of(sampling, decode)
        made = []
        for prompt in prompts:
            self.policy.lengths.check(len(prompt), sampling.max_new_tokens)
        for number, prompt in enumerate(prompts):
            history = History()
            inputs = torch.tensor([list(prompt)] * num_completions, device=device)  # [G, S]
            cache, over = None, torch.zeros(num_completions, dtype=torch.bool, device=device)
            rows = torch.arange(num_completions, device=device)
            for position in range(sampling.max_new_tokens):
                may_stop()
                with (
                    section("sample/decode" if position else "sample/prefill"),
                    self.policy.acting(),
                    self.policy.lengths.fresh(),
                ):
                    output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
                cache = getattr(output, "past_key_values", None)
                sampled = sample_tokens(output.logits[:, -1], keys[number], torch.full_like(rows, position), sampling)
                of_job = number * num_completions + rows
                ended = torch.isin(sampled.tokens, ends)
                if stops is not None:
                    ended |= stops.completed(of_job, ~over, sampled.tokens)
                history.add(of_job, ~over, ended, sampled)
                tokens = sampled.tokens[:, None]
                inputs = torch.cat([inputs, tokens], 1) if cache is None else tokens
                over = over | ended
                if over.all():
                    break
            made += history.completions([number], num_completions)
            if done is not None:
                done(number, made[number])
        return made
