"""A reward model as a reward (R16, R22): trained on pairs that people preferred, then frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter

import torch

from coterie.errors import RewardError, UserError
from coterie.models.codec import Codec
from coterie.models.heads import Scorer
from coterie.models.load import check_scorer, choose_device, load_scorer
from coterie.rewards.text_of import Chat, completion_text
from coterie.rollouts.pack import PromptRows, Row, make_stream, split_by_tokens

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class RewardModel:
    """What a reward model makes of each completion, read off its last token.

    model: the folder of a run of the preset reward_model, or a model with one score in Hugging Face format. device: auto is
    the GPU where there is one. batch_tokens: how many tokens it reads at a time. Prompt and completion are encoded with its own
    tokenizer and template, as its pairs were in training: a completion is followed by the end token, whatever ended it.
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
        failed: list[RewardError | None] = []
        groups: list[PromptRows] = []
        for prompt, pairs in groupby(zip(prompts, completions, strict=True), key=itemgetter(0)):
            start = _encoded(codec, prompt)
            answers = [codec.encode_answer(completion_text(completion)) for _, completion in pairs]
            wrong = [_unfit(start, answer, scorer.base.context_length) for answer in answers]
            failed += wrong
            rows = [Row.written(answer) for answer, reason in zip(answers, wrong, strict=True) if reason is None]
            if rows:
                assert isinstance(start, list)
                groups.append((start, rows))
        scores = iter(self._scores(groups))
        return [reason or next(scores) for reason in failed]

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


def _encoded(codec: Codec, prompt: str | Chat) -> list[int] | RewardError:
    """The prompt's tokens. UserError where the tokenizer can take no chat at all; a single one that it refuses is a failure."""
    content = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    try:
        return codec.encode_prompt(content)
    except UserError as error:
        if not codec.tokenizer.chat_template:
            raise UserError(f"rewards: reward_model: {error}") from None
        return RewardError(str(error))


def _unfit(prompt: list[int] | RewardError, answer: Sequence[int], context_length: int | None) -> RewardError | None:
    """Why the model can't read a completion, or None where it can."""
    if isinstance(prompt, RewardError):
        return prompt
    if not prompt:
        return RewardError("the prompt is empty")
    num_tokens = len(prompt) + len(answer)
    if context_length is not None and num_tokens > context_length:
        return RewardError(
            f"has {num_tokens} tokens with its prompt, more than the reward model's context of {context_length}"
        )
    return None
