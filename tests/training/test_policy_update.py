"""One optimiser step is the same however the batch is cut, and starts at a ratio of 1."""

import math
from dataclasses import replace

import pytest
import torch
from small_streams import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from coterie.algorithms.advantages import group_advantages
from coterie.algorithms.aggregate import AGGREGATIONS
from coterie.algorithms.ratios import RATIOS
from coterie.fast.native import NativeEngine
from coterie.fast.serve import Policy
from coterie.models.logprobs import logprobs_of, token_logprobs
from coterie.noise import mix
from coterie.recipe import make_recipe
from coterie.recipe.presets import PRESETS
from coterie.recipe.settings import ColdStart, Optimiser, Sampling
from coterie.rewards.base import Reward
from coterie.rollouts.pack import Row, make_stream, pack, split_by_tokens
from coterie.training.formulas import make_advantages
from coterie.training.loss_weights import first_loss_weights
from coterie.training.policy_update import optimise
from coterie.training.sft import fit
from coterie.training.step import learning_rate_at, make_optimiser, take_step
from coterie.types import Group, Prompt, Scored

SAMPLING = Sampling(max_new_tokens=20)


@pytest.fixture
def batch(make_model):
    """A policy, samples of it with rewards, and another policy to be held to."""
    policy, reference = Policy.of(make_model("qwen3")), Policy.of(make_model("qwen3", initializer_range=0.1))
    return policy, reference, scored_samples(policy, SAMPLING)


@pytest.fixture
def exact_batch(batch):
    """The same in float64, where sums in another order differ by less than anything that matters."""
    policy, reference, scored = batch
    for one in (policy, reference):
        one.model.double()
    return policy, reference, scored


def scored_samples(policy, sampling):
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(61, (3 + 5 * i,), generator=generator).tolist() for i in range(4)]
    keys = mix(torch.arange(4)[:, None], torch.arange(5))
    made = NativeEngine(policy).generate(prompts, keys, sampling, (1, 2))
    groups = [Group(Prompt(i, "q", prompts[i]), completions) for i, completions in enumerate(made)]
    rewards = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    rewards[2] = 0.5  # a group without signal
    rewards[1, 3] = torch.nan  # a completion that abstains
    return Scored(groups, rewards, {"r": rewards}, [])


def recipe_of(**values):
    """A recipe of GRPO with these settings."""
    return make_recipe({"model": "m", "task": {"data": "d"}, "rewards": ["m:f"], **values})


def gradient_of(policy, reference, scored, values, *, micro_batch_tokens=10**6, drop_silent=False):
    """The gradient and the metrics of one update with the settings of a recipe."""
    recipe = recipe_of(**values)
    advantages = make_advantages(recipe, [Reward("r", None)])(scored)
    streams, totals = pack(
        scored, advantages, max_length=20, micro_batch_tokens=micro_batch_tokens, drop_silent=drop_silent
    )
    held = logprobs_of(reference, streams, temperature=1.0)
    optimiser = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    unclipped = recipe.optimiser.model_copy(update={"max_grad_norm": 1e9})
    recipe = recipe.model_copy(update={"optimiser": unclipped})
    given = {"reference": reference, "reference_logprobs": held}
    tally, _ = optimise(policy, optimiser, streams, totals, recipe, first_loss_weights(recipe), **given)
    return {name: p.grad.clone() for name, p in policy.model.named_parameters()}, tally.values(), len(streams)


def shifted(scored):
    """The same samples as if another policy had made them: ratios between 0.6 and 1.6, so that both bounds act."""
    groups = [
        Group(g.prompt, [replace(c, logprobs=c.logprobs + 0.5 * torch.sin(torch.arange(len(c.tokens)) * 1.7)) for c in g.completions])
        for g in scored.groups
    ]  # fmt: skip
    return Scored(groups, scored.rewards, scored.parts, scored.failures)


def assert_same_step(one, other):
    for name in one[0]:
        torch.testing.assert_close(
            one[0][name], other[0][name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name in ("loss/total", "policy/ratio_mean", "policy/clip_low_share", "policy/clip_high_share"):
        if name in one[1]:
            assert one[1][name] == pytest.approx(other[1][name], rel=1e-8, abs=1e-10), name


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_step_is_the_same_for_micro_batches_of_any_size(exact_batch, aggregation, ratio):
    policy, reference, scored = exact_batch
    loss = {"loss": {"ratio": ratio, "aggregation": aggregation, "kl_weight": 0.1}}
    whole = gradient_of(policy, reference, shifted(scored), loss)
    assert whole[2] == 1
    clipped = whole[1]["policy/clip_low_share"], whole[1]["policy/clip_high_share"]
    assert ratio != "token" or min(clipped) > 0
    for size in (1, 40, 90):
        cut = gradient_of(policy, reference, shifted(scored), loss, micro_batch_tokens=size)
        assert cut[2] > 1
        assert_same_step(whole, cut)


VARIANTS = {
    **{preset: {"preset": preset} for preset, values in PRESETS.items() if "method" not in values},
    "dual_clip": {"loss": {"objective": "dual_clip", "clip_ceiling": 1.1}},
    "sequence": {"loss": {"ratio": "sequence"}},
    "gspo_token": {"loss": {"ratio": "sequence_mean_token"}},
    "anchored_sequence": {
        "loss": {
            "objective": "anchored",
            "anchor_level": "sequence",
            "anchor_weight": "reward",
            "aggregation": "sequence_mean",
        }
    },
    "entropy": {"entropy": {"weight": 0.1}},
    "exact_kl": {"loss": {"kl_weight": 0.1}, "kl": {"estimator": "exact"}},
    "truncated": {"correction": {"kind": "truncate", "limit": 1.2}},
    "masked": {"correction": {"kind": "mask", "level": "sequence", "limit": 1.5}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_preset_steps_the_same_however_cut_and_ordered(exact_batch, variant):
    policy, reference, scored = exact_batch
    values = VARIANTS[variant]
    whole = gradient_of(policy, reference, shifted(scored), values)
    assert any(gradient.abs().max() > 0 for gradient in whole[0].values())
    flipped = Scored(scored.groups[::-1], scored.rewards.flip(0), {"r": scored.rewards.flip(0)}, [])
    assert_same_step(whole, gradient_of(policy, reference, shifted(flipped), values, micro_batch_tokens=50))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_leaving_silent_rows_out_changes_no_gradient(batch, aggregation):
    policy, reference, scored = batch
    loss = {"loss": {"aggregation": aggregation, "kl_weight": 0}}
    kept = gradient_of(policy, reference, shifted(scored), loss)
    dropped = gradient_of(policy, reference, shifted(scored), loss, drop_silent=True)
    for name in kept[0]:
        torch.testing.assert_close(kept[0][name], dropped[0][name], rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_formula_written_out(batch):
    """Clip, KL and aggregation against the slow, obvious way: row by row, token by token, in float64."""
    policy, reference, scored = batch
    scored = shifted(scored)
    loss = {"loss": {"clip_low": 0.2, "clip_high": 0.3, "aggregation": "sequence_mean", "kl_weight": 0.1}}
    _, metrics, _ = gradient_of(policy, reference, scored, loss)
    advantages = group_advantages(scored.rewards)
    terms = []
    for p, group in enumerate(scored.groups):
        for c, completion in enumerate(group.completions):
            if math.isnan(scored.rewards[p, c]):
                continue
            row = torch.tensor([group.prompt.tokens + completion.tokens], device=DEVICE)
            start, total = len(group.prompt.tokens), 0.0
            with torch.no_grad():
                ours, theirs = (m.model(row).logits[0].double().log_softmax(-1) for m in (policy, reference))
            for n, token in enumerate(completion.tokens):
                now, held = ours[start + n - 1, token].item(), theirs[start + n - 1, token].item()
                ratio = math.exp(now - completion.logprobs[n].item())
                a = advantages[p, c].item()
                kl = math.exp(held - now) - 1 - (held - now)
                total += -min(ratio * a, min(max(ratio, 0.8), 1.3) * a) + 0.1 * ratio * kl
            terms.append(total / len(completion.tokens))
    assert metrics["loss/total"] == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_correction_weighs_the_ratio_by_the_sampler_s_distance(exact_batch, kind, level):
    """pi_old is the trainer's own, so the first ratio is 1 and no bound acts; each token's gradient is its advantage times
    min(pi_old / pi_sampler, limit), or nothing where that is above the limit or below 1 / limit."""
    policy, reference, scored = exact_batch
    scored = shifted(scored)
    limit = 1.25 if level == "token" else 1.05
    correction = {"correction": {"kind": kind, "level": level, "limit": limit}}
    loss = {"loss": {"aggregation": "token_mean", "clip_low": 0.01, "clip_high": 0.01, "kl_weight": 0}}
    found, metrics, _ = gradient_of(policy, reference, scored, {**loss, **correction})
    assert metrics["policy/ratio_max"] == 1
    assert 0 < metrics["policy/correction_cut_share"] < 1
    advantages = group_advantages(scored.rewards)
    streams, totals = pack(scored, advantages, max_length=20, micro_batch_tokens=10**6, drop_silent=False)
    policy.model.zero_grad()
    for stream in (stream.to(DEVICE) for stream in streams):
        logprobs = token_logprobs(policy, stream)
        gaps = (logprobs.detach() - stream.sampler_logprobs).tolist()
        rows = stream.row.tolist()
        of_row = {row: sum(gap for gap, its in zip(gaps, rows, strict=True) if its == row) for row in rows}
        ratios = [math.exp(of_row[row] if level == "sequence" else gap) for gap, row in zip(gaps, rows, strict=True)]
        weights = [min(r, limit) if kind == "truncate" else r * (1 / limit <= r <= limit) for r in ratios]
        weighed = torch.tensor(weights, dtype=torch.float64, device=DEVICE) * stream.advantages[stream.row]
        (-(weighed * logprobs).sum() / totals.num_tokens).backward()
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(
            found[name], parameter.grad, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(max_new_tokens=20, temperature=0.7, top_p=0.9)])
def test_the_first_ratio_is_one_and_later_ones_leave_it(make_model, sampling):
    policy = Policy.of(make_model("qwen3"))
    scored = scored_samples(policy, sampling)
    advantages = group_advantages(scored.rewards)
    streams, totals = pack(scored, advantages, max_length=20, micro_batch_tokens=60, drop_silent=True)
    optimiser = make_optimiser(policy.model, Optimiser(learning_rate=1e-3))
    values = {"loss": {"kl_weight": 0}, "sampling": sampling.model_dump()}
    recipe = recipe_of(**values)
    weights = first_loss_weights(recipe)
    first = optimise(policy, optimiser, streams, totals, recipe, weights, sampled_by_policy=True)[0].values()
    assert abs(first["policy/ratio_mean"] - 1) < 1e-6
    assert abs(first["policy/ratio_max"] - 1) < 1e-6
    assert first["policy/sampler_gap_max"] < 1e-5  # and that is no trick: the sampler's own values are this close
    assert first["policy/kl_to_sampler"] < 1e-9

    again = optimise(policy, optimiser, streams, totals, recipe, weights)[0].values()
    assert again["policy/ratio_max"] > 1.001
    several = recipe_of(**values, optimiser={"updates_per_batch": 3})
    moved = optimise(policy, optimiser, streams, totals, several, weights, sampled_by_policy=True)[0].values()
    assert moved["policy/ratio_max"] > 1.001
    assert moved["policy/kl_to_sampler"] > 1e-7


class Waits(TorchDispatchMode):
    """Counts the operations whose result the host waits for."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function.name().split(".")[0] in ("aten::_local_scalar_dense", "aten::nonzero", "aten::bincount")
        return function(*arguments, **(keywords or {}))


def test_the_host_waits_for_the_device_once_a_step(batch):
    policy, reference, scored = batch
    counts = []
    for size in (40, 10**6):
        streams, totals = pack(
            scored, group_advantages(scored.rewards), max_length=20, micro_batch_tokens=size, drop_silent=False
        )
        held = logprobs_of(reference, streams, temperature=1.0)
        optimiser = make_optimiser(policy.model, Optimiser())
        with Waits() as waits:
            recipe = recipe_of(loss={"kl_weight": 0.1})
            tally, _ = optimise(
                policy, optimiser, streams, totals, recipe, first_loss_weights(recipe), reference_logprobs=held
            )
        counts.append((len(streams), waits.count))
        assert tally.values()["optimiser/skipped_share"] == 0
    assert counts[0][0] > 3
    assert [waited for _, waited in counts] == [1, 1]


def test_a_loss_that_is_not_finite_never_reaches_the_weights(batch):
    policy, _, scored = batch
    streams, _ = pack(
        scored, group_advantages(scored.rewards), max_length=20, micro_batch_tokens=10**6, drop_silent=False
    )
    optimiser = make_optimiser(policy.model, Optimiser(learning_rate=1.0))
    before = [p.detach().clone() for p in policy.model.parameters()]
    for poison in (torch.nan, torch.inf):
        tally = take_step(
            optimiser,
            streams,
            lambda _, stream, x=poison: (token_logprobs(policy, stream) * x).sum(),
            policy.device,
            1.0,
        )
        assert tally.values()["optimiser/skipped_share"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_an_infinite_loss_in_a_micro_batch_skips_the_step(batch, poisoned):
    policy, _, scored = batch
    streams, _ = pack(scored, group_advantages(scored.rewards), max_length=20, micro_batch_tokens=90, drop_silent=False)
    assert len(streams) > 2
    optimiser = make_optimiser(policy.model, Optimiser(learning_rate=1.0))
    before = [p.detach().clone() for p in policy.model.parameters()]

    def loss_of(number, stream):
        return token_logprobs(policy, stream).sum() + (math.inf if number == poisoned else 0.0)

    tally = take_step(optimiser, streams, loss_of, policy.device, 1.0)
    assert tally.values()["optimiser/skipped_share"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_a_batch_without_signal_is_a_step_with_no_gradient(make_model):
    """Adam's momentum goes on, as it does where the rows are not left out."""
    results = []
    for drop_silent in (True, False):
        policy = Policy.of(make_model("qwen3"))
        optimiser = make_optimiser(policy.model, Optimiser(learning_rate=1e-2))
        scored = scored_samples(policy, SAMPLING)
        flat = Scored(scored.groups, torch.ones(4, 5), {}, [])
        for samples in (scored, flat):
            streams, totals = pack(
                samples, group_advantages(samples.rewards), max_length=20, micro_batch_tokens=10**6, drop_silent=drop_silent
            )  # fmt: skip
            recipe = recipe_of(loss={"kl_weight": 0})
            optimise(policy, optimiser, streams, totals, recipe, first_loss_weights(recipe))
        results.append([p.detach().clone() for p in policy.model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_sft_is_the_mean_negative_log_likelihood_of_the_answers(make_model):
    model = make_model("llama")
    policy = Policy.of(model)
    pairs = [([3, 4, 5], [6, 7, 8, 9]), ([10], [11, 12]), ([3, 4, 5], [20])]
    logprobs = []
    for prompt, answer in pairs:
        table = model(torch.tensor([prompt + answer], device=DEVICE)).logits[0].log_softmax(-1)
        logprobs += [table[len(prompt) + n - 1, token] for n, token in enumerate(answer)]
    expected = -torch.stack(logprobs).mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    groups = [(prompt, [Row(answer, torch.zeros(len(answer)))]) for prompt, answer in pairs]
    for size in (5, 1000):
        streams = [make_stream(part) for part in split_by_tokens(groups, size)]
        tally = fit(policy, torch.optim.SGD(model.parameters(), lr=0.0), streams, max_grad_norm=1e9)
        assert tally.values()["loss/total"] == pytest.approx(expected.item(), rel=1e-5)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_learning_rates_by_hand():
    linear = Optimiser(learning_rate=1.0, warmup_steps=2, schedule="linear")
    assert [learning_rate_at(s, 6, linear) for s in range(1, 7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    floor = Optimiser(learning_rate=1.0, schedule="linear", final_share=0.5)
    assert [learning_rate_at(s, 2, floor) for s in (1, 2)] == [1.0, 0.75]
    cosine = ColdStart(learning_rate=1.0, warmup_steps=0, schedule="cosine")
    assert learning_rate_at(3, 4, cosine) == pytest.approx(0.5)
    assert learning_rate_at(99, 100, Optimiser(learning_rate=3.0)) == 3.0
