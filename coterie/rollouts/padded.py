"""The slow engine, for architectures that can't share a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.models.policy import Policy
from coterie.recipe import Sampling
from coterie.rollouts.engine import History, sample_tokens
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
        self, prompts: Sequence[Sequence[int]], keys: Tensor, sampling: Sampling, end_tokens: Sequence[int]
    ) -> list[list[Completion]]:
        """See `Engine`."""
        model, device = self.policy.model, self.policy.device
        num_completions = keys.shape[1]
        keys, ends = keys.to(device), torch.tensor(list(end_tokens), device=device)
        history = History()
        for number, prompt in enumerate(prompts):
            inputs = torch.tensor([list(prompt)] * num_completions, device=device)  # [G, S]
            cache, done = None, torch.zeros(num_completions, dtype=torch.bool, device=device)
            rows = torch.arange(num_completions, device=device)
            for position in range(sampling.max_new_tokens):
                output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
                cache = getattr(output, "past_key_values", None)
                live = rows[~done]
                sampled = sample_tokens(
                    output.logits[live, -1], keys[number, live], torch.full_like(live, position), sampling
                )
                history.add(number * num_completions + live, sampled)
                tokens = inputs[:, -1].clone()  # finished rows repeat themselves, unread
                tokens[live] = sampled.tokens
                inputs = torch.cat([inputs, tokens[:, None]], 1) if cache is None else tokens[:, None]
                done[live] |= torch.isin(sampled.tokens, ends)
                if done.all():
                    break
        return history.completions(len(prompts), num_completions, set(end_tokens))
