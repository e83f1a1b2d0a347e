"""The plain engine: one group after another, through what the model itself keeps of the tokens before. The reference of the others.

Legend: G completions of a prompt, S its tokens, n tokens after it, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.models.policy import Policy
from coterie.rollouts.engine import Ends, Engine, Job, sample_tokens
from coterie.sections import section
from coterie.stopping import may_stop
from coterie.types import Completion


class PaddedEngine(Engine):
    """Samples one group after another, through what transformers' model keeps of the tokens before: keys and values, a state.

    That is tried on a few tokens first. A model that keeps nothing, or hands back something else than it was, is run on the whole
    sequence for every token. Raises UserError for a model that can't be run at all.
    """

    def __init__(self, policy: Policy) -> None:
        from coterie.rollouts.memory import remembers  # which decodes as this engine does

        super().__init__(policy)
        self._remembers = remembers(policy)

    def sample(self, job: Job) -> list[list[Completion]]:
        made = []
        for number in range(len(job.prompts)):
            made.append(self._group(job, number))
            if job.done is not None:
                job.done(number, made[number])
        return made

    def _group(self, job: Job, number: int) -> list[Completion]:
        """The completions of one prompt, a token of each at a time. Rows that have ended draw on, and what they draw is left out."""
        policy, device, ends = self.policy, self.policy.device, Ends(job)
        rows = torch.arange(job.num_completions, device=device)  # [G]
        inputs = torch.tensor([list(job.prompts[number])] * len(rows), device=device)  # [G, S]
        memory: Mapping[str, Any] = {}
        live, lengths = torch.ones_like(rows, dtype=torch.bool), torch.zeros_like(rows)
        drawn: list[tuple[Tensor, Tensor, Tensor]] = []  # of each step: tokens, log-probabilities, entropies, [G]
        supports: list[list[Tensor]] = [[] for _ in rows]  # of each row: for each token, the ids that could be drawn
        for position in range(job.sampling.max_new_tokens):
            may_stop()
            with section("sample/decode" if position else "sample/prefill"), policy.acting(), policy.lengths.fresh():
                logits, memory = next_logits(policy.model, inputs, memory, self._remembers)  # [G, V]
            sampled = sample_tokens(logits, job.keys[number], torch.full_like(rows, position), job.sampling)
            drawn.append((sampled.tokens, sampled.logprobs, sampled.entropies))
            if sampled.support is not None:
                for own, possible in zip(supports, sampled.support, strict=True):
                    own.append(possible.nonzero()[:, 0].cpu())
            lengths += live
            live = live & ~ends.reached(rows, live, sampled.tokens)
            if not live.any():
                break
            tokens = sampled.tokens[:, None]
            inputs = tokens if self._remembers else torch.cat([inputs, tokens], 1)
        tokens, logprobs, entropies = (torch.stack(column, 1).cpu() for column in zip(*drawn, strict=True))  # [G, n]
        return [
            Completion(
                tokens=tokens[row, :length].tolist(),
                logprobs=logprobs[row, :length],
                entropies=entropies[row, :length],
                ended="length" if cut else "stop",
                support=supports[row][:length] or None,
            )
            for row, (length, cut) in enumerate(zip(lengths.tolist(), live.tolist(), strict=True))
        ]


def next_logits(
    model: PreTrainedModel, inputs: Tensor, memory: Mapping[str, Any], remembers: bool
) -> tuple[Tensor, Mapping[str, Any]]:
    """The logits after inputs [G, n], with what the model kept of the tokens before: [G, V], and what it keeps now.

    Its memory is what it returns under the name of one of its arguments: `cache`, `past_key_values`, `cache_params`, `state`, ...
    Under another name many models swallow it without a word.
    """
    output = model(input_ids=inputs, use_cache=remembers, **memory)
    if not remembers:
        return output.logits[:, -1], {}
    arguments = inspect.signature(type(model).forward).parameters
    return output.logits[:, -1], {name: value for name, value in output.items() if name in arguments}
