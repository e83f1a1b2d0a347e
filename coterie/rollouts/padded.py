"""The plain engine: one group after another, through what the model itself keeps of the tokens before. The reference of the others.

Legend: G completions of a prompt, S its tokens, n tokens after it, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from coterie.models.policy import Policy
from coterie.rollouts.engine import Ends, Engine, Job, Transcript, sample_tokens
from coterie.rollouts.memory import next_logits, remembers
from coterie.sections import section
from coterie.stopping import may_stop
from coterie.types import Completion


class PaddedEngine(Engine):
    """Samples one group after another, through what transformers' model keeps of the tokens before: keys and values, a state.

    That is tried on a few tokens first. A model that keeps nothing, or hands back something else than it was, is run on the whole
    sequence for every token. Raises UserError for a model that can't be run at all.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self._remembers = remembers(policy)

    def sampled(self, job: Job) -> list[list[Completion]]:
        made = []
        for number in range(len(job.prompts)):
            made.append(self._group(job, number))
            if job.done is not None:
                job.done(number, made[number])
        return made

    def _group(self, job: Job, number: int) -> list[Completion]:
        """The completions of one prompt, a token of each at a time."""
        policy, device = self.policy, self.policy.device
        transcript, ends = Transcript(), Ends(job)
        inputs = torch.tensor([list(job.prompts[number])] * job.num_completions, device=device)  # [G, S]
        kept: Mapping[str, Any] = {}
        live = torch.ones(job.num_completions, dtype=torch.bool, device=device)
        rows = number * job.num_completions + torch.arange(job.num_completions, device=device)
        for position in range(job.sampling.max_new_tokens):
            may_stop()
            with section("sample/decode" if position else "sample/prefill"), policy.acting(), policy.lengths.fresh():
                logits, kept = next_logits(policy.model, inputs, kept, self._remembers)  # [G, V]
            sampled = sample_tokens(logits, job.keys[number], torch.full_like(rows, position), job.sampling)
            ended = ends.reached(rows, live, sampled.tokens)
            transcript.add(rows, live, ended, sampled)
            live = live & ~ended
            if not live.any():
                break
            tokens = sampled.tokens[:, None]
            inputs = tokens if self._remembers else torch.cat([inputs, tokens], 1)
        return transcript.completions([number], job.num_completions)[0]
