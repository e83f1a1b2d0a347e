"""How a model is served: decided at the start, from what it is and from tests on a small copy of it.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.errors import UserError
from coterie.models.attention import UnservedModelError, observed
from coterie.models.body import Body
from coterie.models.layout import StreamLayout
from coterie.models.lengths import Lengths
from coterie.models.policy import Policy, context_length_of

_SMALL = 1 << 25  # parameters of a model that is copied
_ALLOWED = 1e-3  # of the largest output, or of 1, in float32: rounding is a hundredth of it, and mistakes in grown weights a hundred times
_SEED = 0


def serve(model: PreTrainedModel) -> Policy:
    """A policy that computes what the model does. Raises UserError for one that is no causal language model."""
    model.eval()
    with torch.random.fork_rng(devices=[]), _without_gradients(model):
        specimen = _specimen(model)
        with _without_gradients(specimen):
            _check_causal(specimen, type(model).__name__)
            try:
                return _on_stream(model, specimen)
            except Exception as error:  # a model's code may raise anything where it meets what it was not made for
                why = _in_a_line(error)
            alone = _differs_beside_others(specimen)
    warnings.warn(
        f"{type(model).__name__} can't share prompts ({why}); it is sampled and trained padded, which is slower",
        stacklevel=3,
    )
    return Policy(model, "padded", lengths=replace(Lengths.of(model), alone=alone))


def _on_stream(model: PreTrainedModel, specimen: PreTrainedModel) -> Policy:
    """Raises where the stream does not serve."""
    settings = observed(specimen)
    windows = {layer: one.window for layer, one in settings.items()}
    trial = Policy(specimen, "stream", windows, lengths=Lengths.of(specimen))
    _check_isolated(trial)
    sample = _Sample.of(specimen)
    allowed = _ALLOWED
    for shift in (0, *_shifts(specimen)):
        difference = _largest_difference(trial, sample, shift)
        if not difference <= allowed:
            raise UnservedModelError(
                f"outputs differ by {difference:.2g}" + (f" from position {shift} on" if shift else "")
            )
    ours = Policy(model, "stream", windows, lengths=Lengths.of(model))
    body = Body.of(specimen.base_model, settings)
    if body is not None and all(
        _largest_difference(replace(trial, body=body), sample, shift) <= allowed for shift in (0, *_shifts(specimen))
    ):
        return replace(ours, body=Body.of(model.base_model, observed(model)))
    return ours


def _in_a_line(error: Exception) -> str:
    """What went wrong in a model's code, in words for a person."""
    if isinstance(error, UnservedModelError):
        return str(error)
    if isinstance(error, AttributeError | TypeError) and "_Seen" in str(error):
        return "it computes with its masks by itself"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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


def _specimen(model: PreTrainedModel) -> PreTrainedModel:
    """What is tried in the model's place: a copy with larger weights in float32 where that is cheap, else itself."""
    if sum(parameter.numel() for parameter in model.parameters()) > _SMALL:
        return model
    specimen = copy.deepcopy(model).float()
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
        small = sum(parameter.numel() for parameter in model.parameters()) <= _SMALL
        apart = Lengths.of(model)
        longest = min(48 if small else 12, context_length_of(model.config) or 48, *apart.switches, *apart.stretches)
        prompt = max(1, longest // 3)
        segments = [(prompt, [longest - prompt, max(1, longest // 4)]), (max(1, prompt - 2), [longest // 2, 1])]
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
        """Of each completion: which of the tokens it is, and the tokens of its prompt and itself."""
        found, at = [], 0
        for _, of_prompt in self.segments:
            found += [
                (at + 1 + i, torch.cat([self.tokens[at], self.tokens[at + 1 + i]])) for i in range(len(of_prompt))
            ]
            at += 1 + len(of_prompt)
        return found


def _output(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Logits, or of a model without a head its last hidden states."""
    output = model(**{"use_cache": False, **inputs})
    return (output.logits if model.get_output_embeddings() is not None else output.last_hidden_state).float()


@torch.no_grad()
def _check_causal(model: PreTrainedModel, name: str) -> None:
    """Raises UserError where the model can't be run on tokens, or reads the tokens that it should predict."""
    try:
        sample = _Sample.of(model)
        row = sample.rows[0][1]
        kept = len(row) // 2
        other = torch.cat([row[:kept], row[kept:].flip(0).roll(1)])
        before, after = (_output(model, input_ids=tokens[None])[0, :kept] for tokens in (row, other))
    except Exception as error:  # each architecture asks for what it needs in its own way
        raise UserError(
            f"model: {name} can't be run on tokens alone, as a language model is: {_in_a_line(error)}"
        ) from error
    moved = (before - after).abs().max().item()
    if not moved <= _ALLOWED * before.abs().max().clamp(min=1).item():
        decoder = "; its is_decoder is false" if getattr(model.config, "is_decoder", None) is False else ""
        raise UserError(
            f"model: {name} is no causal language model as it is configured: what it makes of a token changes with the tokens "
            f"after it{decoder}"
        )


@torch.no_grad()
def _largest_difference(policy: Policy, sample: _Sample, shift: int = 0) -> float:
    """Between the stream's outputs and each row's alone, as a share of the row's largest or of 1, with positions that begin at `shift`."""
    model = policy.model
    layout = StreamLayout(sample.segments, model.device)
    hidden = policy.run(torch.cat(sample.tokens), sample.positions.to(model.device) + shift, layout)
    outputs = policy.logits(hidden) if model.get_output_embeddings() is not None else hidden
    parts = outputs.float().split([len(part) for part in sample.tokens])
    errors = []
    for place, row in sample.rows:
        more = {"position_ids": torch.arange(shift, shift + len(row), device=row.device)[None]} if shift else {}
        with policy.lengths.fresh():
            alone = _output(model, input_ids=row[None], **more)[0, -len(parts[place]) :]
        errors.append(((parts[place] - alone).abs().max() / alone.abs().max().clamp(min=1)).item())
    return max(errors) if all(error == error for error in errors) else float("nan")


def _check_isolated(policy: Policy) -> None:
    """Raises UnservedModelError where a sequence of the stream has any effect on another than its prompt's on a completion.

    The gradient of what is computed for one with respect to the embeddings of the others is exactly zero, whatever the rounding.
    """
    sample, model = _Sample.of(policy.model), policy.model
    leaves: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            layout = StreamLayout(sample.segments, model.device)
            states = policy.run(torch.cat(sample.tokens), sample.positions.to(model.device), layout)
            generator = torch.Generator().manual_seed(_SEED)
            projected = (states * torch.randn(states.shape, generator=generator).to(states)).sum(1)  # [T]
    finally:
        hook.remove()
    (leaf,) = leaves
    owner = torch.arange(len(sample.tokens)).repeat_interleave(torch.tensor([len(part) for part in sample.tokens]))
    seen = {0: (0,), 1: (0, 1), 2: (0, 2), 4: (3, 4)}  # of two groups of a prompt and two completions each
    for sequence, allowed in seen.items():
        wanted = (owner == sequence).to(projected)
        (gradient,) = torch.autograd.grad(projected, leaf, wanted, retain_graph=True)
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
            elif isinstance(value, int | float) and name in ("original_max_position_embeddings", "floor_scale"):
                found.add(int(value))

    look(model.config.get_text_config().to_dict())
    return sorted(found) if not Lengths.of(model).stretches else []


@torch.no_grad()
def _differs_beside_others(model: PreTrainedModel) -> bool:
    """Whether rows that are run side by side, padded, give something else than each alone."""
    policy, rows = Policy(model, "padded", lengths=Lengths.of(model)), [row for _, row in _Sample.of(model).rows]
    try:
        outputs = policy.padded(lambda **inputs: _output(model, **inputs), rows)
    except Exception:  # a model that takes no mask, say
        return True
    for row, beside in zip(rows, outputs, strict=True):
        with policy.lengths.fresh():
            alone = _output(model, input_ids=row[None])[0]
        if not (beside - alone).abs().max() <= _ALLOWED * alone.abs().max().clamp(min=1):
            return True
    return False
