"""A reward model as a reward: trained on pairs that people preferred, then frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter

import torch

from coterie.errors import RewardError, UserError
from coterie.fast.serve import load_scorer
from coterie.models.codec import Codec
from coterie.models.heads import Scorer
from coterie.models.load import check_scorer, choose_device
from coterie.rewards.text_of import Chat, completion_text
from coterie.rollouts.pack import PromptRows, Row, make_stream, split_by_tokens

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class RewardModel:
    """What a reward model makes of each completion, read off its last token.

    model: the folder of a run of the preset reward_model, or a model with one score in Hugging Face format. device: auto is
    the GPU where there is one. batch_tokens: how many tokens it reads at a time. Prompt and completion are encoded with its own
    tokenizer and template, as its pairs were in training: a completion is followed by the end of its turn, whatever ended it.
    """

    model: str
    device: str = "auto"
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise UserError(f"rewards: reward_model: model: {self.model!r} is no folder")
        if self.device not in DEVICES:
            raise UserError(f"rewards: reward_model: device: {self.device!r} is none of {', '.join(DEVICES)}")
        if isinstance(self.batch_tokens, bool) or not isinstance(self.batch_tokens, int) or self.batch_tokens < 1:
            raise UserError(f"rewards: reward_model: batch_tokens: {self.batch_tokens!r} is no whole number above 0")
        try:
            choose_device(self.device)
            check_scorer(self.model)
        except UserError as error:
            raise UserError(f"rewards: reward_model: {error}") from None

    def __call__(self, prompts: Sequence[str | Chat], completions: Sequence[str | Chat]) -> list[float | Exception]:
        """One score for each completion. One that is too long for the model's context is a failure."""
        scorer, codec = self._loaded
        encoded = [
            _encoded(codec, prompt, completion_text(completion), scorer.base.context_length)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        fitting = (row for row in encoded if not isinstance(row, RewardError))
        groups: list[PromptRows] = [
            (start, [Row.written(answer) for _, answer in rows]) for start, rows in groupby(fitting, key=itemgetter(0))
        ]
        scores = iter(self._scores(groups))
        return [row if isinstance(row, RewardError) else next(scores) for row in encoded]

    @torch.no_grad()
    def _scores(self, groups: Sequence[PromptRows]) -> list[float]:
        """Of every row, in order."""
        scorer, _ = self._loaded
        streams = [make_stream(part) for part in split_by_tokens(groups, self.batch_tokens)]
        return [value for stream in streams for value in scorer.scores(stream.to(scorer.device)).tolist()]

    @cached_property
    def _loaded(self) -> tuple[Scorer, Codec]:
        """The model and its tokenizer, read when they are first needed."""
        try:
            return load_scorer(self.model, choose_device(self.device))
        except UserError as error:
            raise UserError(f"rewards: reward_model: {error}") from None

    def close(self) -> None:
        """Forget the model, so that its memory is free."""
        self.__dict__.pop("_loaded", None)


def _encoded(
    codec: Codec, prompt: str | Chat, completion: str, context_length: int | None
) -> tuple[list[int], ...] | RewardError:
    """A completion after its prompt, as a pair's answer was in training, or why the model can't read it.

    UserError where the tokenizer can take no chat at all.
    """
    content = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    if not isinstance(content, str) and not codec.template.exists:
        raise UserError("rewards: reward_model: the tokenizer has no chat template, which chat messages need")
    try:
        row = codec.encode_rows(content, completion)
    except UserError as error:
        return RewardError(str(error))
    num_tokens = sum(map(len, row))
    if context_length is not None and num_tokens > context_length:
        return RewardError(
            f"has {num_tokens} tokens with its prompt, more than the reward model's context of {context_length}"
        )
    return row
