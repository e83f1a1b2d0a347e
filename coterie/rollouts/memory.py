"""Whether a model's memory of the tokens before, keys and values or a state, can be relied on: a trial before the plain engine samples.

Legend: n tokens, S those of a trial's prompt, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.errors import UserError, first_line
from coterie.models.policy import Policy
from coterie.models.rounding import TIMES, rounding_of
from coterie.rollouts.padded import next_logits

_DECODED = 4  # tokens that are decoded to see whether the model's memory holds
_WORTH = 1e-3  # of what the tokens before do to a prediction: an error that is none
_LONGEST = 1024  # tokens up to which the check goes past the windows and chunks of a configuration

_found: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()  # of each model, what the check found


def remembers(policy: Policy) -> bool:
    """Whether decoding from the model's memory gives what the plain pass gives, with a warning where it does not. Tried once for a model.

    Raises UserError for a model that can't be run."""
    if policy.model not in _found:
        with policy.acting(), policy.lengths.fresh():
            _found[policy.model] = _decodes_from_memory(policy)
    return _found[policy.model]


@torch.no_grad()
def _decodes_from_memory(policy: Policy) -> bool:
    model, tokens = policy.model, _trial_tokens(policy)
    start, name = tokens.shape[1] - _DECODED, type(policy.model).__name__

    def predictions(inputs: Tensor) -> Tensor:
        return model(input_ids=inputs, use_cache=False).logits.float().log_softmax(-1)

    try:
        plain, moved = rounding_of(model, lambda: predictions(tokens)[:, start - 1 : -1])  # [2, n, V]
    except RuntimeError as error:
        raise UserError(
            f"model: {name} can't be run with weights of the type {model.dtype}: {first_line(error)}"
        ) from error
    forgetful = torch.stack([predictions(tokens[:, at - 1 : at])[:, -1] for at in range(start, tokens.shape[1])], 1)
    allowed = max(_WORTH * (forgetful - plain).abs().max().item(), TIMES * moved.max().item())
    try:
        found = torch.stack(_decoded(model, tokens, start), 1)
    except Exception as error:  # the model's own code, called in a way that it may not be made for
        why = f"decoding from its cache fails: {first_line(error)}"
    else:
        off = (found - plain).abs().max().item()
        if off <= allowed:
            return True
        why = f"decoding from what it keeps of them is {off:.2g} nats off"
    warnings.warn(
        f"{name} does not remember the tokens before ({why}); for every token that it samples it is run on the whole sequence, "
        "which is slower",
        stacklevel=4,
    )
    return False


def _decoded(model: PreTrainedModel, tokens: Tensor, start: int) -> list[Tensor]:
    """Log-probabilities of what follows each of the last tokens, one after another from the model's memory: n of [2, V]."""
    inputs, found = tokens[:, :start], []
    memory: Mapping[str, Any] = {}
    for at in range(start, tokens.shape[1]):
        logits, memory = next_logits(model, inputs, memory, remembers=True)
        found.append(logits.float().log_softmax(-1))
        inputs = tokens[:, at : at + 1]
    return found


def _trial_tokens(policy: Policy) -> Tensor:
    """Two sequences with one beginning, that go past the windows and chunks of the configuration where these are short: [2, S + n].

    The token for padding is among them: some models count positions without it.
    """
    model, generator = policy.model, torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    spans = (value for name, value in config.to_dict().items() if "window" in name or "chunk" in name)
    longest = max((span for span in spans if isinstance(span, int) and 8 < span <= _LONGEST), default=8) + 1
    limits = (policy.context_length, *policy.lengths.switches, *policy.lengths.stretches)
    start = max(1, min(longest, *(limit - _DECODED for limit in limits if limit), longest))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(vocabulary, (1, start), generator=generator).expand(2, -1)
    tokens = torch.cat([prompt, torch.randint(vocabulary, (2, _DECODED), generator=generator)], 1)
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and 0 <= padding < vocabulary:
        tokens[:, [start // 2, start]] = padding
    return tokens.to(model.device)
