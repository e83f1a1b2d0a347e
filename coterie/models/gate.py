"""The decision how a model is served: made at the start, from what it is and from tests on a small copy of it.

A model is served on the stream where each layer attends once, through transformers' interface, with a mask that is causal and no
more than windowed; where nothing reaches a sequence from another one, by its gradient; and where every row gives what it gives
alone. Otherwise it is run padded, after a warning that says why. A model that does not predict tokens from those before them is
refused.

What fresh weights hide shows with larger ones, and rounding in half precision hides much. So a model that is small is tried as a
copy in float32 with its weights enlarged; a large one, which was trained before, as it is.

Legend: T tokens of a stream, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.errors import UserError, first_line
from coterie.models.adapters import dequantise
from coterie.models.attention import UnservedModelError
from coterie.models.lengths import Lengths, context_length_of, side_by_side
from coterie.models.observe import observed
from coterie.models.policy import Policy
from coterie.models.rounding import rounding_of

_SMALL = 1 << 25  # parameters of a model that is copied
# Of the largest output, or of 1, in float32: rounding is a hundredth of it, and a mistake a hundred times where weights are large
_ALLOWED = 1e-3
_SEED = 0


_Kind = TypeVar("_Kind", bound=Policy)


def serve(model: PreTrainedModel, kind: type[_Kind]) -> _Kind:
    """A policy of a kind that computes what the model does. Raises UserError for one that is no causal language model."""
    if hasattr(model, "peft_config"):
        raise UserError(
            f"{type(model).__name__} holds adapters that peft put in; take the plain model and "
            "Policy.of(model).with_adapter(Lora(rank=16), seed=0), or merge them first: model.merge_and_unload()"
        )
    model.eval()
    text = model.config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) and text._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # in sdpa transformers 5.17 leaves the limit on scores out, silently
    with torch.random.fork_rng(devices=[]), _without_gradients(model):
        specimen = _specimen(model)
        with _without_gradients(specimen):
            trial = _Trial.of(specimen, type(model).__name__)
            _check_type(model, trial.sample)
            try:
                return _on_stream(model, trial, kind)
            except Exception as error:  # broad: a model's own code, which meets what it was not made for
                why = _in_a_line(error)
            alone = _differs_beside_others(trial)
    warnings.warn(
        f"{type(model).__name__} can't share prompts ({why}); it is sampled and trained padded, which is slower",
        stacklevel=3,
    )
    return kind(model, "padded", lengths=replace(Lengths.of(model), alone=alone))


def _on_stream(model: PreTrainedModel, trial: _Trial, kind: type[_Kind]) -> _Kind:
    """Raises where the stream does not serve."""
    settings = observed(trial.model)
    windows = {layer: one.window for layer, one in settings.items()}
    policy = kind(trial.model, "stream", windows, lengths=Lengths.of(trial.model))
    _check_isolated(policy, trial.sample)
    body = kind.body_of(trial.model.base_model, settings)
    for shift in (0, *_shifts(trial.model)):
        alone = trial.alone(shift)
        difference = trial.difference(policy, alone, shift)
        if not difference <= trial.allowed:
            since = f" from position {shift} on" if shift else ""
            raise UnservedModelError(f"outputs differ by {difference:.2g}{since}")
        if body is not None and not trial.difference(replace(policy, body=body), alone, shift) <= trial.allowed:
            body = None
    own = kind.body_of(model.base_model, observed(model)) if body is not None else None
    return kind(model, "stream", windows, own, Lengths.of(model))


def _in_a_line(error: Exception) -> str:
    """The reason why a model's code failed, in words for a person."""
    if isinstance(error, UnservedModelError):
        return str(error)
    if isinstance(error, AttributeError | TypeError) and "_Seen" in str(error):
        return "it computes with its masks by itself"
    return f"its own code fails there: {type(error).__name__}: {first_line(error)}"[:200]


@contextmanager
def _without_gradients(model: PreTrainedModel) -> Iterator[None]:
    """The weights as constants: gradients reach what goes in, and nothing is kept for them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _is_small(model: PreTrainedModel) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) <= _SMALL


def _specimen(model: PreTrainedModel) -> PreTrainedModel:
    """The model that is tried: a copy with larger weights in float32 where that is cheap, else itself."""
    if not _is_small(model):
        return model
    specimen = copy.deepcopy(model)
    dequantise(specimen)
    specimen.float().to(model.device)
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter in specimen.parameters():
            scale = 0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) * scale)
    return specimen


@dataclass(frozen=True)
class _Sample:
    """Groups of random tokens, whose rows get the same kind of positions: segments as in a stream, and the tokens of each prompt and
    completion in order."""

    segments: list[tuple[int, list[int]]]
    tokens: list[Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Sample:
        apart = Lengths.of(model)
        limits = (context_length_of(model.config) or 48, *apart.switches, *apart.stretches)
        longest = max(2, min(48 if _is_small(model) else 8, *limits))
        prompt = max(1, longest // 3)
        segments = [(prompt, [longest - prompt, max(1, longest // 4)]), (max(1, prompt - 1), [longest // 2])]
        vocabulary = model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(_SEED)
        lengths = [length for prompt, of_prompt in segments for length in (prompt, *of_prompt)]
        tokens = [torch.randint(vocabulary, (length,), generator=generator).to(model.device) for length in lengths]
        return cls(segments, tokens)

    @property
    def positions(self) -> Tensor:
        """[T]"""
        parts = [
            torch.arange(start, start + length)
            for prompt, of_prompt in self.segments
            for start, length in ((0, prompt), *((prompt, length) for length in of_prompt))
        ]
        return torch.cat(parts)

    @property
    def rows(self) -> list[tuple[int, Tensor]]:
        """Each completion: which of the tokens it is, and the tokens of its prompt and itself."""
        found, at = [], 0
        for _, of_prompt in self.segments:
            found += [
                (at + 1 + i, torch.cat([self.tokens[at], self.tokens[at + 1 + i]])) for i in range(len(of_prompt))
            ]
            at += 1 + len(of_prompt)
        return found


@dataclass(frozen=True)
class _Trial:
    """A model, a sample, and how far its outputs may differ: as a share of the largest of a row, or of 1."""

    model: PreTrainedModel
    sample: _Sample
    allowed: float

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, name: str) -> _Trial:
        """Raises UserError where the model can't be run on tokens, or reads the tokens that it should predict."""
        try:
            sample = _Sample.of(model)
            row = sample.rows[0][1]
            kept = len(row) // 2
            vocabulary = model.get_input_embeddings().weight.shape[0]
            other = torch.cat([row[:kept], (row[kept:] + 1) % vocabulary])
            before, after, start = (_output(model, input_ids=tokens[None])[0] for tokens in (row, other, row[:kept]))
            noise = 0.0 if model.dtype in (torch.float32, torch.float64) else _noise(model, row)
        except Exception as error:  # broad: each architecture asks for what it needs in its own way
            raise UserError(
                f"model: {name} can't be run on tokens alone, as a language model is: {_in_a_line(error)}"
            ) from error
        if not before.isfinite().all():
            raise UserError(
                f"model: what {name} makes of tokens is not finite: weights of it are NaN, infinite, or too large"
            )
        trial = cls(model, sample, max(_ALLOWED, 3 * noise))
        decoder = "; its is_decoder is false" if getattr(model.config, "is_decoder", None) is False else ""
        for found, what in ((after[:kept], "the tokens after it"), (start, "how many tokens come after it")):
            if not _difference(found, before[:kept]) <= trial.allowed:
                raise UserError(
                    f"model: {name} is no causal language model as it is configured: what it makes of a token changes with "
                    f"{what}{decoder}"
                )
        return trial

    @torch.no_grad()
    def alone(self, shift: int = 0) -> list[Tensor]:
        """The outputs of each row by itself, with positions that begin at `shift`: [length, V] of each completion."""
        found, fresh = [], Lengths.of(self.model)
        for place, row in self.sample.rows:
            more = {"position_ids": torch.arange(shift, shift + len(row), device=row.device)[None]} if shift else {}
            with fresh.fresh():
                found.append(_output(self.model, input_ids=row[None], **more)[0, -len(self.sample.tokens[place]) :])
        return found

    @torch.no_grad()
    def difference(self, policy: Policy, alone: Sequence[Tensor], shift: int) -> float:
        """The largest between the stream's outputs and each row's alone."""
        sample, device = self.sample, self.model.device
        positions = sample.positions.to(device) + shift
        hidden = policy.run(torch.cat(sample.tokens), positions, policy.layout(sample.segments))
        outputs = policy.logits(hidden) if self.model.get_output_embeddings() is not None else hidden
        parts = outputs.float().split([len(part) for part in sample.tokens])
        differences = [
            _difference(parts[place], by_itself) for (place, _), by_itself in zip(sample.rows, alone, strict=True)
        ]
        return max(differences, key=lambda x: (x != x, x))  # what is no number is the largest


def _output(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Logits, or of a model without a head its last hidden states."""
    output = model(**{"use_cache": False, **inputs})
    return (output.logits if model.get_output_embeddings() is not None else output.last_hidden_state).float()


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def _noise(model: PreTrainedModel, row: Tensor) -> float:
    """The effect of rounding on a model in half precision, as `_difference`."""
    plain, moved = rounding_of(model, lambda: _output(model, input_ids=row[None]), trials=2)
    return (moved.max() / plain.abs().max().clamp(min=1)).item()


def _check_type(model: PreTrainedModel, sample: _Sample) -> None:
    """Raises UserError where the model can't be run, or has no gradient, in its own precision."""
    leaves: list[Tensor] = []
    try:
        with torch.enable_grad(), _embeddings_kept(model, leaves):
            torch.autograd.grad(_output(model, input_ids=sample.rows[0][1][None]).sum(), leaves[0], allow_unused=True)
    except Exception as error:  # broad: a model's own code, in a precision that it may not be made for
        raise UserError(
            f"model: {type(model).__name__} can't be trained with weights of the type {model.dtype}: {_in_a_line(error)}"
        ) from error


@contextmanager
def _embeddings_kept(model: PreTrainedModel, leaves: list[Tensor]) -> Iterator[None]:
    """Put what the model's embeddings give in `leaves`, and let gradients end there."""

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # which a model may change in place

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()


def _check_isolated(policy: Policy, sample: _Sample) -> None:
    """Raises UnservedModelError where a sequence of the stream has any effect on another than its prompt's on a completion.

    The gradient of what is computed for one with respect to the embeddings of the others is exactly zero, whatever the rounding.
    """
    model = policy.model
    owner = torch.arange(len(sample.tokens)).repeat_interleave(torch.tensor([len(part) for part in sample.tokens]))
    for sequence, allowed in ((2, (0, 2)), (4, (3, 4))):  # of a prompt, two completions, a prompt, and one
        leaves: list[Tensor] = []
        with torch.enable_grad(), _embeddings_kept(model, leaves):
            layout = policy.layout(sample.segments)
            states = policy.run(torch.cat(sample.tokens), sample.positions.to(model.device), layout)
            generator = torch.Generator().manual_seed(_SEED)
            projected = (states * torch.randn(states.shape, generator=generator).to(states)).sum(1)  # [T]
        (leaf,) = leaves
        # Each time from a pass of its own: what torch compiles has no gradient twice
        (gradient,) = torch.autograd.grad(projected, leaf, (owner == sequence).to(projected))
        touched = set(owner[(gradient.view(len(owner), -1) != 0).any(1).cpu()].tolist())
        if not touched <= set(allowed):
            raise UnservedModelError("what stands in one sequence reaches another one")


def _shifts(model: PreTrainedModel) -> list[int]:
    """Positions past each limit that the configuration names, beyond which a model may turn or scale otherwise."""
    found: set[int] = set()

    def look(settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            if isinstance(value, Mapping):
                look(value)
            elif isinstance(value, int | float) and (name == "original_max_position_embeddings" or "floor" in name):
                found.add(int(value))

    look(model.config.get_text_config().to_dict())
    return sorted(found) if not Lengths.of(model).stretches else []


@torch.no_grad()
def _differs_beside_others(trial: _Trial) -> bool:
    """Whether rows that are run side by side, padded, give something else than each alone."""
    model, rows = trial.model, [row for _, row in trial.sample.rows]
    try:
        outputs = side_by_side(lambda **inputs: _output(model, **inputs), rows, Lengths.of(model))
    except Exception:  # broad: a model's own code, which may take no mask, say
        return True
    for beside, alone in zip(outputs, trial.alone(), strict=True):
        if not _difference(beside[-len(alone) :], alone) <= trial.allowed:
            return True
    return False
