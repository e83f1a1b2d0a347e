"""Every architecture gives what its plain self gives, one sequence at a time, on the stream or padded, or is refused in a sentence.

The table of docs/models.md is what is found here. `COTERIE_WRITE_MODELS=1` writes it anew:
`COTERIE_WRITE_MODELS=1 python -m pytest -m slow tests/models/test_every_architecture.py`.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from architectures import NOT_ON_THE_STREAM, TYPES, VARIANTS, VOCABULARY, tiny_model
from conftest import some_quick
from small_streams import plain_logprobs, stream_of
from torch import Tensor
from transformers import PreTrainedModel

from coterie.errors import UserError
from coterie.fast.serve import Policy, make_engine
from coterie.models.logprobs import token_logprobs
from coterie.models.rounding import TIMES, rounding_of
from coterie.recipe.settings import Lora, Sampling

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
Groups = list[tuple[list[int], list[list[int]]]]
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


def some_groups() -> Groups:
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    return [(draw(prompt), [draw(length) for length in lengths]) for prompt, lengths in SHAPES]


def gradients_of(model: PreTrainedModel, logprobs: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (logprobs * weights).mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def sampled_from(policy: Policy, groups: Groups) -> tuple[Tensor, Groups]:
    """What a policy writes after each prompt, and the log-probabilities that it recorded: [N]."""
    prompts = [prompt for prompt, _ in groups]
    made = make_engine(policy).generate(prompts, torch.arange(4).view(2, 2), Sampling(max_new_tokens=6), [])
    recorded = torch.cat([one.logprobs for of in made for one in of])
    return recorded, [(p, [one.tokens for one in of]) for p, of in zip(prompts, made, strict=True)]


def compare(model: PreTrainedModel) -> Found:
    """Serve a model, then compare log-probabilities, gradients and sampled log-probabilities with the plain way."""
    groups = some_groups()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            policy = Policy.of(model)
            logprobs = token_logprobs(policy, stream_of(groups))
            ours = gradients_of(model, logprobs)
            recorded, sampled = sampled_from(policy, groups)
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
        again = plain_logprobs(model, sampled)
    return Found(
        policy.served,
        next((str(one.message) for one in caught if "can't share prompts" in str(one.message)), ""),
        (logprobs - plain).abs().max().item(),
        max(errors),
        (recorded - again).abs().max().item(),
    )


# One of each way of being served, and of what is special to the ways
QUICK = (
    "bert",
    "bloom",
    "cohere",
    "doge",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_oss",
    "granite",
    "lfm2",
    "mixtral",
    "nemotron",
    "qwen3",
)
QUICK += ("smollm3", "stablelm")


def check(found: Found) -> None:
    assert found.logprobs <= LOGPROBS
    assert found.gradients <= GRADIENTS
    assert found.sampler <= LOGPROBS


def built(architecture: str, settings: dict[str, object]) -> PreTrainedModel:
    try:
        return tiny_model(architecture, grown=True, **settings)
    except Exception as error:  # each configuration is refused in its own way
        pytest.skip(f"this version of transformers does not build it: {error}")


@pytest.mark.parametrize("architecture", some_quick(TYPES, *QUICK))
def test_every_architecture_gives_what_each_sequence_gives_alone(architecture: str) -> None:
    """And is served as the page says."""
    found = compare(built(architecture, {}))
    check(found)
    FOUND[architecture] = found
    version, table = page_table()
    if at_least(version) and not os.environ.get("COTERIE_WRITE_MODELS"):
        assert table.get(architecture) == found.served, found.why


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_gives_what_each_sequence_gives_alone(variant: str) -> None:
    found = compare(built(*VARIANTS[variant]))
    check(found)
    if at_least(page_table()[0]):
        assert found.served == NOT_ON_THE_STREAM.get(variant, "stream"), found.why


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TYPES)
def test_lora_in_all_linear_layers_merged_is_what_acted(architecture: str) -> None:
    """On the stream or padded, against the plain pass of the merged model, whose weights are rounded once more."""
    model, groups = built(architecture, {}), some_groups()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            policy = Policy.of(model).with_adapter(Lora(rank=2), seed=0)
        except UserError:
            return
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        start = token_logprobs(policy, stream_of(groups))
        for _, matrix in policy.named_parameters():
            matrix.add_(torch.randn(matrix.shape, generator=generator) * 0.1)
    acted = token_logprobs(policy, stream_of(groups))
    acted.sum().backward()
    assert any(matrix.grad is not None and matrix.grad.any() for _, matrix in policy.named_parameters())
    policy.adapter.merge()
    merged, moved = rounding_of(model, lambda: plain_logprobs(model, groups))
    assert (acted - start).abs().max() > 1e-2
    assert (acted - merged).abs().max() <= max(LOGPROBS, TIMES * moved.max().item())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TYPES)
def test_half_precision_differs_by_no_more_than_rounding(architecture: str) -> None:
    """By three times the plain model's own noise in bfloat16: what it differs from itself in float32, or where each of its results is
    rounded a little otherwise, whichever is more."""
    model, groups = built(architecture, {}), some_groups()
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            policy = Policy.of(half)
        except UserError:
            return
        found = token_logprobs(policy, stream_of(groups))
        recorded, sampled = sampled_from(policy, groups)
        for ours, rows in ((found, groups), (recorded, sampled)):
            exact = plain_logprobs(model, rows)
            plain, moved = rounding_of(half, lambda rows=rows: plain_logprobs(half, rows))
            noise = max((plain - exact).abs().max().item(), moved.max().item())
            assert (ours - plain).abs().max().item() <= 3 * noise


FOUND: dict[str, Found] = {}


@pytest.fixture(scope="module", autouse=True)
def write_the_page() -> Iterator[None]:
    yield
    if os.environ.get("COTERIE_WRITE_MODELS") and FOUND:
        text = PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition("<!-- models -->")
        PAGE.write_text(
            f"{before}<!-- models -->\n{table_of(FOUND)}<!-- end -->{rest.partition('<!-- end -->')[2]}",
            encoding="utf-8",
        )


def table_of(findings: dict[str, Found]) -> str:
    """Architectures by how they are served, and why so."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, found in sorted(findings.items()):
        why = re.search(r"share prompts \((.*)\); it is", found.why) or re.search(r"^model: \w+ (.*)$", found.why)
        reason = re.sub(r" by [\d.e-]+|\b[A-Z]\w+Attention\b ?", "", why[1]) if why else ""
        rows.setdefault((found.served, reason), []).append(name)
    order = sorted(rows.items(), key=lambda row: (("stream", "padded", "refused").index(row[0][0]), -len(row[1])))
    lines = [
        f"| {served} | {reason} | {', '.join(f'`{name}`' for name in names)} |" for (served, reason), names in order
    ]
    made = f"Made with transformers {transformers.__version__}.\n\n| served | why | architectures |\n|---|---|---|\n"
    return made + "\n".join(lines) + "\n"


def page_table() -> tuple[str, dict[str, str]]:
    """The version that the page was made with, and how each architecture is served by it."""
    text = PAGE.read_text(encoding="utf-8").partition("<!-- models -->")[2].partition("<!-- end -->")[0]
    version = re.search(r"Made with transformers ([\d.]+)\.", text)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| stream", "| padded", "| refused"))]
    return version[1] if version else "", {
        name: row[0][2:] for row in rows for name in re.findall(r"`([^`]+)`", row[-1])
    }


def at_least(version: str) -> bool:
    parts = lambda text: tuple(int(part) for part in re.findall(r"\d+", text)[:3])  # noqa: E731
    return bool(version) and parts(transformers.__version__) >= parts(version)
