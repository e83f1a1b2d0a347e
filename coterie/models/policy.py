"""A language model as a policy: hidden states of a stream, and logits from them, whatever the architecture.

Legend: T tokens of the stream, N completion tokens, B rows, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.errors import UserError
from coterie.models.adapters import Adapter, add_adapter
from coterie.models.attention import AttentionSettings, Layout, Windows, stream_attention
from coterie.models.layout import DenseLayout
from coterie.models.lengths import Lengths, SubStream, context_length_of, rows_apart, side_by_side
from coterie.models.recompute import recomputable_layers, recomputed, recomputed_layers
from coterie.recipe.settings import Lora
from coterie.types import Stream

# What a model computes below its head, in another way: tokens [T], positions [T], a layout, places [M] or None, and how to call
# what is to be computed again in the backward pass, or None -> [T, D], or [M, D]
Body = Callable[[Tensor, Tensor, Layout, Tensor | None, Callable[..., Tensor] | None], Tensor]


@dataclass(frozen=True)
class Policy:
    """Any transformers causal language model. Dropout is off: with it, sampler and trainer would differ.

    served: "stream" where the packed stream gives what the unmodified model gives; "padded" where it does not, and each
    completion is run with a prompt of its own instead. windows: how far back each layer sees on the stream.
    body: another forward pass of the model below its head, where there is one that gives the same as the model's own.
    lengths: which sequences may be run together, where positions depend on how long a sequence is.
    adapter: the LoRA matrices that it computes with, and that are trained in place of the model's weights.
    recomputes: whether a backward pass computes each layer again, from its inputs alone.
    mixed: whether products are of bfloat16 numbers, by weights that are float32.

    `body_of`, `layout` and `head_logprobs` are plain here: the model's own forward pass, dense blocks, chunks of logits.
    A run's policy, `coterie.Policy`, overrides these three with faster ones, in `fast/serve.py`.
    """

    model: PreTrainedModel
    served: Literal["stream", "padded"]
    windows: Windows = field(default_factory=dict)
    body: Body | None = None
    lengths: Lengths = field(default_factory=Lengths)
    adapter: Adapter | None = None
    recomputes: bool = False
    mixed: bool = False

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

    def head_inputs(self, stream: Stream) -> Tensor:
        """What `logits` takes for each token that the policy wrote: the states that predict it, [N, D]; for a padded policy, which
        runs its model's head with the rest, these are the logits already, [N, V]."""
        if self.served == "padded":
            outputs = self.padded_outputs(lambda **inputs: self.model(**inputs).logits, stream)
            return torch.cat([output[:-1] for output in outputs])
        return self.stream_states(stream, stream.predictors, stream.row)

    def logits(self, head_inputs: Tensor) -> Tensor:
        """The model's head, with what some architectures do after it: [..., D] -> [..., V]."""
        if self.served == "padded":
            return head_inputs
        with self._precision():
            logits, config = self.model.get_output_embeddings()(head_inputs), self.model.config.get_text_config()
        logits = logits.float() if self.mixed else logits
        for name, act in AFTER_HEAD.items():
            if (setting := getattr(config, name, None)) is not None:
                logits = act(logits, setting)
        return logits

    def stream_states(self, stream: Stream, wanted: Tensor, rows: Tensor) -> Tensor:
        """The model below its head at some places of a stream, in any order and more than once: wanted [N] -> [N, D].

        rows [N]: whose they are; a prompt's places belong to each of its rows. Which those are is worked out on the host, where
        `wanted` lies. The stream is run in one part, unless positions depend on how long a row is."""
        parts = rows_apart(stream, wanted, rows, self.lengths)
        found = [self._states(part) for part in parts]
        if len(parts) == 1:
            return found[0]
        order = torch.cat([part.entries for part in parts]).argsort()
        return torch.cat(found).index_select(0, order.to(self.device))

    def _states(self, part: SubStream) -> Tensor:
        """Each place once, however often it is wanted: the last of a prompt predicts the first token of all its completions."""
        places, which = (x.to(self.device) for x in part.wanted.unique(return_inverse=True))
        return self.run(part.tokens, part.positions, self.layout(part.segments), places).index_select(0, which)

    def run(self, tokens: Tensor, positions: Tensor, layout: Layout, places: Tensor | None = None) -> Tensor:
        """The model below its head on a stream: tokens [T], positions [T] -> [T, D], or at M places of it: [M, D]."""
        with self.lengths.fresh():
            if self.body is not None:
                with self.acting():
                    recompute = recomputed(self.acting) if self._recomputes_now else None
                    return self.body(tokens, positions, layout, places, recompute)
            with self.acting(layout), self._keeping_inputs(layout):
                output = self.model.base_model(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        states = output.last_hidden_state[0]
        return states if places is None else states.index_select(0, places)

    def padded_outputs(self, run: Callable[..., Tensor], stream: Stream) -> list[Tensor]:
        """The slow, obvious way, for every completion with its own copy of the prompt: what `run` computes at the last token of the
        prompt and at each of the completion's n, [n + 1, ...]."""
        prompts, rows = zip(*stream.rows(), strict=True)
        with self.acting(), self._keeping_inputs():
            outputs = side_by_side(run, rows, self.lengths)
        return [output[prompt - 1 :] for prompt, output in zip(prompts, outputs, strict=True)]

    @contextmanager
    def acting(self, layout: Layout | None = None) -> Iterator[None]:
        """The surroundings of a forward pass: the policy's adapter, and our attention where a layout is given."""
        adapter = self.adapter.acting() if self.adapter is not None else nullcontext()
        attention = stream_attention(self.model, layout, self.windows) if layout is not None else nullcontext()
        with adapter, attention, self._precision():
            yield

    def _precision(self) -> AbstractContextManager[Any]:
        """In mixed precision products are of bfloat16 numbers. Source: torch.autocast, which says what is and what is not."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.mixed else nullcontext()

    def _keeping_inputs(self, layout: Layout | None = None) -> AbstractContextManager[None]:
        """With activation checkpointing on, each layer keeps only its inputs: the backward pass computes the rest again."""
        return recomputed_layers(self.model, partial(self.acting, layout)) if self._recomputes_now else nullcontext()

    @property
    def _recomputes_now(self) -> bool:
        return self.recomputes and torch.is_grad_enabled()

    def layout(self, segments: Sequence[tuple[int, Sequence[int]]]) -> Layout:
        """The layout of a stream of groups: (prompt length, lengths of its completions) each."""
        return DenseLayout(segments, self.device)

    def head_logprobs(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor | None:
        """log softmax(head(hidden) / temperature)[targets], [N], at once; None where it is to be computed in chunks."""
        return None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Wrap a model, after finding out what it is served by. Raises UserError for one that can't be sampled and trained, and for one
        that peft wraps."""
        from coterie.models.gate import serve  # which runs policies

        return serve(model, cls)

    @classmethod
    def body_of(cls, model: nn.Module, settings: Mapping[int, AttentionSettings]) -> Body | None:
        """A forward pass to try in place of the one of a model below its head, or None where there is none."""
        return None

    def with_adapter(self, settings: Lora, seed: int) -> Self:
        """The same model, to be trained through LoRA matrices that are put into it. They do nothing yet."""
        return replace(self, adapter=add_adapter(self.model, settings, seed))

    def in_mixed_precision(self) -> Self:
        """The same policy with products of bfloat16 numbers, of weights that stay what they are."""
        return replace(self, mixed=True, body=None)

    def recomputing(self) -> Self:
        """The same policy with activation checkpointing."""
        if not recomputable_layers(self.model):
            name = type(self.model).__name__
            raise UserError(f"optimiser.activation_checkpointing: {name} has no layers that can be computed again")
        return replace(self, recomputes=True)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are trained and saved."""
        return (self.adapter or self.model).named_parameters()


# What some architectures do to their logits, by the setting that asks for it
AFTER_HEAD: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma 2
}
