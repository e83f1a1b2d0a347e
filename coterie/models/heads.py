"""A language model's body with one output in place of its vocabulary: a value model (R13), or a reward model (R16).

Legend: T tokens of the stream, N completion tokens, B rows, D width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from coterie.errors import UserError
from coterie.models.body import Body
from coterie.models.policy import Policy, padded_outputs
from coterie.types import Stream


@dataclass(frozen=True)
class Scorer:
    """A transformers sequence-classification model with one label, on the same stream as the policy."""

    model: PreTrainedModel
    served: Literal["stream", "padded"]
    body: Body | None = None

    @classmethod
    def from_policy(cls, policy: Policy) -> Scorer:
        """The policy's body, copied, and a head of zeros: every score starts at exactly 0.

        Raises UserError for an architecture that transformers has no sequence-classification model for.
        """
        config = copy.deepcopy(policy.model.config)
        config.num_labels = 1
        try:
            with torch.random.fork_rng(devices=[]):  # the fresh weights are replaced: no random number is spent on them
                model = AutoModelForSequenceClassification.from_config(config)
            model.base_model.load_state_dict(policy.model.base_model.state_dict())
            torch.nn.init.zeros_(model.score.weight)
        except (ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"model: {type(policy.model).__name__} has no form with one score: {reason}") from error
        model.to(device=policy.device, dtype=policy.model.dtype).eval()
        return cls(model, policy.served, Body(model.base_model, policy.body.settings) if policy.body else None)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def values(self, stream: Stream) -> Tensor:
        """What the model expects before each completion token is written: [N]."""
        if self.served == "padded":
            return self._scored(torch.cat([row[prompt - 1 : -1] for prompt, row in self._padded(stream)]))
        return self._scored(self._states(stream).index_select(0, stream.predictors))

    def scores(self, stream: Stream) -> Tensor:
        """What the model makes of each whole completion, read off its last token: [B]."""
        if self.served == "padded":
            return self._scored(torch.stack([row[-1] for _, row in self._padded(stream)]))
        ends, at = [], 0
        for prompt_length, lengths in stream.segments:
            at += prompt_length
            for length in lengths:
                at += length
                ends.append(at - 1)
        return self._scored(self._states(stream).index_select(0, torch.tensor(ends, device=self.device)))

    def _states(self, stream: Stream) -> Tensor:
        return Policy(self.model, "stream", self.body).stream_states(stream)

    def _padded(self, stream: Stream) -> list[tuple[int, Tensor]]:
        return padded_outputs(lambda **inputs: self.model.base_model(**inputs).last_hidden_state, stream)

    def _scored(self, states: Tensor) -> Tensor:
        """[..., D] -> [...], in float32."""
        return self.model.score(states).squeeze(-1).float()
