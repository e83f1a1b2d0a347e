"""A language model's body with one output in place of its vocabulary: a value model, or a reward model.

Legend: T tokens of the stream, N completion tokens, B rows, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from coterie.errors import UserError, first_line
from coterie.models.adapters import Adapter
from coterie.models.policy import Policy
from coterie.types import Stream


@dataclass(frozen=True)
class Scorer:
    """A transformers sequence-classification model with one label, on the same stream as the policy.

    base: the model below its head, run as the policy is. Where it has an adapter its weights are the policy's own, and only the
    adapter and the head are trained.
    """

    model: PreTrainedModel
    base: Policy

    @classmethod
    def from_policy(cls, policy: Policy) -> Scorer:
        """The policy's body, and a head of zeros: every score starts at exactly 0.

        The body is a copy; where the policy has an adapter it is shared, without that adapter and with another one.
        Raises UserError for an architecture that transformers has no sequence-classification model for.
        """
        model = _without_weights(policy)
        base, dtype = replace(policy, model=policy.model.base_model), policy.model.dtype
        if policy.adapter is not None:
            base, dtype = replace(base, adapter=policy.adapter.added("scorer")), torch.float32  # as an adapter is
        else:
            base = copy.deepcopy(base)
            base.model.requires_grad_(True)
        setattr(model, model.base_model_prefix, base.model)
        head = model.score.to_empty(device=policy.device).to(dtype)
        torch.nn.init.zeros_(head.weight)
        return cls(model.eval(), base)

    @classmethod
    def of(cls, model: PreTrainedModel, kind: type[Policy]) -> Scorer:
        """A sequence-classification model that is trained already, compared on the stream as a policy of this kind is."""
        return cls(model.eval(), kind.of(model.base_model))

    @staticmethod
    def check(policy: Policy) -> None:
        """Raises what `from_policy` raises, without its cost."""
        _without_weights(policy)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are trained and saved."""
        if self.adapter is None:
            return self.model.named_parameters()
        head = ((f"score.{name}", parameter) for name, parameter in self.model.score.named_parameters())
        return chain(self.adapter.named_parameters(), head)

    @property
    def adapter(self) -> Adapter | None:
        return self.base.adapter

    @property
    def device(self) -> torch.device:
        return self.model.device

    def values(self, stream: Stream) -> Tensor:
        """The reward that the model expects before each completion token is written: [N]."""
        if self.base.served == "padded":
            return self._scored(torch.cat([output[:-1] for output in self._padded(stream)]))
        return self._scored(self.base.stream_states(stream, stream.predictors, stream.row))

    def scores(self, stream: Stream) -> Tensor:
        """The score of each whole completion, read off its last token: [B]."""
        if self.base.served == "padded":
            return self._scored(torch.stack([output[-1] for output in self._padded(stream)]))
        ends, at = [], 0
        for prompt_length, lengths in stream.segments:
            at += prompt_length
            for length in lengths:
                at += length
                ends.append(at - 1)
        return self._scored(self.base.stream_states(stream, torch.tensor(ends), torch.arange(len(ends))))

    def _padded(self, stream: Stream) -> list[Tensor]:
        return self.base.padded_outputs(lambda **inputs: self.base.model(**inputs).last_hidden_state, stream)

    def _scored(self, states: Tensor) -> Tensor:
        """[N, D] -> [N], in float32."""
        head = self.model.score
        return head(states.to(head.weight.dtype)).squeeze(-1).float()


def _without_weights(policy: Policy) -> PreTrainedModel:
    """The architecture's model with one score in place of a vocabulary. It holds no memory yet, and spends no random number."""
    config = copy.deepcopy(policy.model.config)
    config.num_labels = 1
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        ours, theirs = type(policy.model.base_model), type(model.base_model)
        if ours is not theirs:
            raise ValueError(f"its body would be a {theirs.__name__}, and is a {ours.__name__}")
        if model.score.bias is not None or model.score.out_features != 1:
            raise ValueError("its head is no plain one")
    except (ValueError, RuntimeError, AttributeError) as error:
        name = type(policy.model).__name__
        raise UserError(f"model: {name} has no form with one score: {first_line(error)}") from error
    return model
