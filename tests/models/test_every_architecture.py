"""Every architecture gives what its plain self gives, one sequence at a time, on the stream or padded, or is refused in a sentence."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from architectures import VOCABULARY, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from coterie.errors import UserError
from coterie.models.logprobs import token_logprobs
from coterie.models.policy import Policy
from coterie.rollouts.collect import make_engine
from coterie.rollouts.pack import Row, make_stream
from coterie.settings import Sampling
from coterie.types import Stream

LOGPROBS, GRADIENTS = 2e-5, 2e-4
SHAPES = ((9, (14, 5)), (4, (11, 3)))  # prompt, completions: past every small window and chunk


@dataclass(frozen=True)
class Found:
    """What became of a model: served "stream", "padded" or "refused", why not better, and how far it is from its plain self."""

    served: str
    why: str = ""
    logprobs: float = 0.0
    gradients: float = 0.0
    sampler: float = 0.0


def some_groups() -> list[tuple[list[int], list[list[int]]]]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    return [(draw(prompt), [draw(length) for length in lengths]) for prompt, lengths in SHAPES]


def stream_of(groups: list[tuple[list[int], list[list[int]]]]) -> Stream:
    return make_stream([(p, [Row(c, torch.zeros(len(c))) for c in cs]) for p, cs in groups])


def plain_logprobs(model: PreTrainedModel, groups: list[tuple[list[int], list[list[int]]]]) -> Tensor:
    """Each sequence by itself through the model as transformers has it: [N]."""
    parts = []
    for prompt, completions in groups:
        for completion in completions:
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].float()
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            parts.append(logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(parts)


def gradients_of(model: PreTrainedModel, logprobs: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (logprobs * weights).mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def compare(model: PreTrainedModel) -> Found:
    """Serve a model, then compare log-probabilities, gradients and sampled log-probabilities with the plain way."""
    groups = some_groups()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            policy = Policy.of(model)
            logprobs = token_logprobs(policy, stream_of(groups))
            ours = gradients_of(model, logprobs)
            keys = torch.arange(4).view(2, 2)
            sampled = make_engine(policy).generate([p for p, _ in groups], keys, Sampling(max_new_tokens=6), [])
        except UserError as error:
            return Found("refused", str(error))
    plain = plain_logprobs(model, groups)
    theirs = gradients_of(model, plain)
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    errors = [
        (
            (ours.get(name, torch.zeros(())) - gradient).abs().max() / max(gradient.abs().max().item(), 1e-2 * largest)
        ).item()
        for name, gradient in theirs.items()
    ]
    with torch.no_grad():
        again = plain_logprobs(
            model, [(p, [one.tokens for one in of]) for (p, _), of in zip(groups, sampled, strict=True)]
        )
    recorded = torch.cat([one.logprobs for of in sampled for one in of])
    return Found(
        policy.served,
        next((str(one.message) for one in caught if "can't share prompts" in str(one.message)), ""),
        (logprobs - plain).abs().max().item(),
        max(errors),
        (recorded - again).abs().max().item(),
    )


# One of each way of being served, and of what is special to the ways
QUICK = ("bert", "doge", "gemma2", "gpt2", "gpt_oss", "lfm2", "mixtral", "nemotron", "qwen3", "smollm3", "stablelm")


def check(found: Found) -> None:
    assert found.logprobs <= LOGPROBS
    assert found.gradients <= GRADIENTS
    assert found.sampler <= LOGPROBS


@pytest.mark.parametrize("architecture", QUICK)
def test_it_gives_what_each_sequence_gives_alone(architecture: str) -> None:
    check(compare(tiny_model(architecture, grown=True)))
