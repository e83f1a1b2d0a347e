"""A language model as a policy: hidden states of a stream, and logits from them, whatever the architecture.

Legend: T tokens of the stream, N completion tokens, B rows, V vocabulary, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from coterie.errors import UserError
from coterie.models.adapters import Adapter, add_adapter
from coterie.models.attention import AttentionSettings, Layout, UnservedModelError, stream_attention
from coterie.models.body import Body
from coterie.models.layout import StreamLayout
from coterie.models.recompute import recomputable_layers, recomputed, recomputed_layers
from coterie.settings import Lora
from coterie.types import Stream


@dataclass(frozen=True)
class Policy:
    """Any transformers causal language model. Dropout is off: with it, sampler and trainer would differ.

    served: "stream" where the packed stream gives what the unmodified model gives; "padded" where it does not, and each
    completion is run with a prompt of its own instead. body: our forward pass of the model below its head, where it gives the
    same as the model's own.
    adapter: the LoRA matrices that it computes with, and that are trained in place of the model's weights.
    recomputes: whether a backward pass computes each layer again, from its inputs alone.
    """

    model: PreTrainedModel
    served: Literal["stream", "padded"]
    body: Body | None = None
    adapter: Adapter | None = None
    recomputes: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> Policy:
        """Wrap a model, after comparing the stream with the model's own forward pass on a few tokens."""
        model.eval()
        allowed = 1e-3 if model.dtype == torch.float32 else 0.1
        try:
            settings: dict[int, AttentionSettings] = {}
            difference = _stream_error(cls(model, "stream"), settings)
        except (UnservedModelError, TypeError, AttributeError) as error:
            why = str(error)
        else:
            if difference <= allowed:
                ours = cls(model, "stream", Body.of(model.base_model, settings))
                return ours if ours.body and _stream_error(ours) <= allowed else cls(model, "stream")
            why = f"logits differ by {difference:.2g}"
        warnings.warn(
            f"{type(model).__name__} can't share prompts ({why}); it is sampled and trained padded, which is slower",
            stacklevel=2,
        )
        return cls(model, "padded")

    def with_adapter(self, settings: Lora, seed: int) -> Policy:
        """The same model, to be trained through LoRA matrices that are put into it. They do nothing yet."""
        return replace(self, adapter=add_adapter(self.model, settings, seed))

    def recomputing(self) -> Policy:
        """The same policy with activation checkpointing."""
        if not recomputable_layers(self.model):
            name = type(self.model).__name__
            raise UserError(f"optimiser.activation_checkpointing: {name} has no layers that can be computed again")
        return replace(self, recomputes=True)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained and saved of it."""
        return (self.adapter or self.model).named_parameters()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocabulary_size(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def context_length(self) -> int | None:
        """The most tokens that one sequence may have, or None where the model sets no limit."""
        return context_length_of(self.model.config)

    def hidden_states(self, stream: Stream) -> Tensor:
        """What predicts each token that the policy wrote: [N, D]; of a padded policy its logits, [N, V]."""
        if self.served == "padded":
            with self.acting(on_stream=False):
                outputs = padded_outputs(lambda **inputs: self.model(**inputs).logits, stream)
            return torch.cat([row[prompt - 1 : -1] for prompt, row in outputs])
        return self.stream_states(stream, stream.predictors)

    def stream_states(self, stream: Stream, wanted: Tensor) -> Tensor:
        """The model below its head at some places of a stream, in any order and more than once: wanted [N] -> [N, D].

        Which those are is worked out on the host, where `wanted` lies."""
        places, which = (x.to(self.device) for x in wanted.unique(return_inverse=True))
        layout = StreamLayout(stream.segments, self.device)
        return self.run(stream.tokens, stream.positions, layout, places).index_select(0, which)

    def run(self, tokens: Tensor, positions: Tensor, layout: Layout, places: Tensor | None = None) -> Tensor:
        """The model below its head on a stream: tokens [T], positions [T] -> [T, D], or at M places of it: [M, D]."""
        if self.body is not None:
            setting = partial(self._setting, on_stream=False)
            with setting():
                recompute = recomputed(setting) if self._recomputes_now else None
                return self.body.run(tokens, positions, layout, places, recompute)
        with self.acting(on_stream=True):
            output = self.model.base_model(
                input_ids=tokens[None], position_ids=positions[None], layout=layout, use_cache=False
            )
        states = output.last_hidden_state[0]
        return states if places is None else states.index_select(0, places)

    @contextmanager
    def acting(self, *, on_stream: bool) -> Iterator[None]:
        """What a forward pass stands in: the policy's adapter, our attention, and layers that forget what they can compute."""
        setting = partial(self._setting, on_stream=on_stream)
        with setting(), recomputed_layers(self.model, setting) if self._recomputes_now else nullcontext():
            yield

    @property
    def _recomputes_now(self) -> bool:
        return self.recomputes and torch.is_grad_enabled()

    @contextmanager
    def _setting(self, *, on_stream: bool) -> Iterator[None]:
        """What a layer stands in, in the forward pass and where it is computed again."""
        adapter = self.adapter.acting() if self.adapter is not None else nullcontext()
        with adapter, stream_attention(self.model) if on_stream else nullcontext():
            yield

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's head, with what some architectures do after it: [..., D] -> [..., V]."""
        if self.served == "padded":
            return hidden
        config = self.model.config.get_text_config()
        logits = self.model.get_output_embeddings()(hidden)
        if (scale := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scale
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def plain_head(self) -> nn.Linear | None:
        """The model's head, where it is one product in full precision and nothing follows it."""
        head, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        follows = any(getattr(config, name, None) is not None for name in _AFTER_HEAD)
        plain = type(head) is nn.Linear and head.weight.dtype in (torch.float32, torch.float64)
        return head if plain and not follows and self.served == "stream" else None


_AFTER_HEAD = ("logits_scaling", "logit_scale", "final_logit_softcapping")


def quiet_transformers() -> None:
    """Keep transformers' progress bars and advice out of a command's own output."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def context_length_of(config: PretrainedConfig) -> int | None:
    """The most tokens that one sequence may have, or None where the configuration sets no limit."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


@torch.no_grad()
def _stream_error(policy: Policy, settings: dict[int, AttentionSettings] | None = None) -> float:
    """The largest difference, over two small groups, between the stream's logits and the unmodified model's.

    Of a model without a head, between their last hidden states. What each layer's attention is called with is written to `settings`.
    """
    model = policy.model
    has_head = model.get_output_embeddings() is not None
    segments = [(5, [4, 7]), (3, [6, 2])]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens, positions = [], []
    plain: list[Tensor | None] = []
    for prompt_length, lengths in segments:
        prompt = torch.randint(vocabulary, (prompt_length,), generator=generator)
        tokens.append(prompt)
        positions.append(torch.arange(prompt_length))
        plain.append(None)
        for length in lengths:
            completion = torch.randint(vocabulary, (length,), generator=generator)
            tokens.append(completion)
            positions.append(torch.arange(prompt_length, prompt_length + length))
            whole = torch.cat([prompt, completion])[None].to(model.device)
            output = model(input_ids=whole, use_cache=False)
            plain.append((output.logits if has_head else output.last_hidden_state)[0, prompt_length:].float())
    layout = _Watched(StreamLayout(segments, model.device), settings if settings is not None else {})
    hidden = policy.run(torch.cat(tokens).to(model.device), torch.cat(positions).to(model.device), layout)
    outputs = (policy.logits(hidden) if has_head else hidden).float().split([len(part) for part in tokens])
    pairs = [(ours, theirs) for ours, theirs in zip(outputs, plain, strict=True) if theirs is not None]
    errors = [((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item() for ours, theirs in pairs]
    return max(errors)


@dataclass(frozen=True)
class _Watched:
    """A layout that writes down what each layer's attention is called with."""

    layout: Layout
    settings: dict[int, AttentionSettings]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        self.settings[layer] = settings
        return self.layout.attend(layer, q, k, v, settings)


def padded_outputs(run: Callable[..., Tensor], stream: Stream) -> list[tuple[int, Tensor]]:
    """The slow, obvious way: every completion with its own copy of the prompt, padded on the right.

    `run(input_ids=, attention_mask=, use_cache=)` gives [B, longest, ...]. Returns for each row the length of its prompt, and
    what was computed for its tokens, prompt included.
    """
    rows, prompts, at = [], [], 0
    for prompt_length, lengths in stream.segments:
        prompt = stream.tokens[at : at + prompt_length]
        at += prompt_length
        for length in lengths:
            rows.append(torch.cat([prompt, stream.tokens[at : at + length]]))
            prompts.append(prompt_length)
            at += length
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [B, longest]
    attended = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    outputs = run(input_ids=padded, attention_mask=attended, use_cache=False)
    return [(prompts[b], outputs[b, : len(row)]) for b, row in enumerate(rows)]
