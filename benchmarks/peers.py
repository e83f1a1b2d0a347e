"""What coterie is compared with: transformers' own generation, and completions that each carry a copy of their prompt.

Legend: P prompts, G completions per prompt, B = P*G rows, S prompt tokens, L completion tokens, N = B*L, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from coterie.recipe.settings import Sampling
from coterie.types import Stream

CONTINUOUS_BATCHING = {"page_size": 256, "max_batch_tokens": 512}  # the fastest of those tried on a CPU


def copies(stream: Stream) -> tuple[Tensor, int]:
    """Every completion with its own copy of the prompt: [B, S + L], and L. All prompts and completions are as long."""
    rows, at = [], 0
    for prompt_length, lengths in stream.segments:
        prompt = stream.tokens[at : at + prompt_length]
        at += prompt_length
        for length in lengths:
            rows.append(torch.cat([prompt, stream.tokens[at : at + length]]))
            at += length
    return torch.stack(rows), stream.segments[0][1][0]


def copied_logprobs(model: PreTrainedModel, tokens: Tensor, num_new: int) -> Tensor:
    """The log-probabilities of the last L tokens of each row, from logits that are all held at once: [B, S + L] -> [N].

    Logits are made for the completions only, and without padding transformers needs no mask, which is its fastest attention.
    """
    logits = model(input_ids=tokens, logits_to_keep=num_new + 1, use_cache=False).logits[:, :-1].float()  # [B, L, V]
    return log_softmax_of(logits.flatten(0, 1), tokens[:, -num_new:].flatten())


def log_softmax_of(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [N, V], targets [N] -> [N]."""
    return torch.log_softmax(logits, 1).gather(1, targets[:, None]).squeeze(1)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    group: int,
    sampling: Sampling,
    end_tokens: Sequence[int] = (),
    cache: str = "dynamic",
) -> list[list[int]]:
    """`transformers.generate` on each prompt repeated G times, padded on the left: B completions."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    attended = (torch.arange(longest, device=model.device) >= longest - lengths[:, None]).long()
    written = model.generate(
        tokens.repeat_interleave(group, 0),
        attention_mask=attended.repeat_interleave(group, 0),
        generation_config=_settings(sampling, end_tokens, None if cache == "dynamic" else cache),
    )
    return [_until_end(row, end_tokens) for row in written[:, longest:].tolist()]


def _settings(sampling: Sampling, end_tokens: Sequence[int], cache: str | None = None) -> GenerationConfig:
    greedy = sampling.temperature == 0
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=not greedy,
        temperature=1.0 if greedy else sampling.temperature,
        top_k=0 if not greedy else None,
        top_p=1.0,
        eos_token_id=list(end_tokens) or None,
        pad_token_id=0,
        cache_implementation=cache,
    )


def _until_end(row: list[int], end_tokens: Sequence[int]) -> list[int]:
    for number, token in enumerate(row):
        if token in end_tokens:
            return row[: number + 1]
    return row


class ContinuousBatching:
    """transformers' continuous batching, with room for all rows at once and prompts' pages shared by their groups.

    On a GPU it chooses its own sizes, to fill the memory.
    """

    def __init__(
        self, model: PreTrainedModel, rows: int, longest: int, sampling: Sampling, ends: Sequence[int]
    ) -> None:
        from transformers import ContinuousBatchingConfig  # not in every transformers 5

        settings = _settings(sampling, ends)
        settings.eos_token_id = list(ends) or -1
        sizes = {}
        if model.device.type == "cpu":
            pages = math.ceil((longest + sampling.max_new_tokens) / CONTINUOUS_BATCHING["page_size"])
            sizes = {**CONTINUOUS_BATCHING, "num_blocks": rows * pages + 8}
        self._manager = model.continuous_batching_context_manager(
            generation_config=settings,
            continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=rows, **sizes),
        )
        self._limit = sampling.max_new_tokens

    @contextmanager
    def running(self) -> Iterator[ContinuousBatching]:
        with self._manager as self._running:
            yield self

    def generate(self, prompts: Sequence[Sequence[int]], group: int) -> list[list[int]]:
        inputs = [list(prompt) for prompt in prompts for _ in range(group)]
        names = self._running.add_requests(inputs=inputs, max_new_tokens=self._limit)
        done: dict[str, list[int]] = {}
        while len(done) < len(names):
            result = self._running.get_result(timeout=5)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                done[result.request_id] = list(result.generated_tokens)
            elif not self._running.is_running():
                raise RuntimeError("continuous batching stopped before it was done")
        return [done[name] for name in names]
