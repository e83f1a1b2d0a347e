"""The family of objectives, ratios and advantages against their formulas.

Each reference below is written from its paper's formula, a number at a time, and calls nothing of the package.
Legend: a batch is a list of completions, each a list of tokens; N tokens in all, B completions.
"""

import inspect
import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.algorithms.advantages import (
    BASELINES,
    SCALES,
    group_advantages,
)
from coterie.algorithms.aggregate import AGGREGATIONS, aggregate
from coterie.algorithms.clip import TokenTerms, clipped_loss, dynamic_bounds
from coterie.algorithms.correction import importance_weights
from coterie.algorithms.kl import exact_kl, k3, kl_penalty
from coterie.algorithms.normalised import normalised_then_summed
from coterie.algorithms.objectives import (
    OBJECTIVES,
    anchor_logprobs,
    anchored_loss,
    cispo_loss,
    dual_clipped_loss,
    gmpo_loss,
    policy_gradient_loss,
    sapo_loss,
)
from coterie.algorithms.ratios import MAX_LOG_RATIO, RATIOS, sequence_mean_token_ratio
from coterie.algorithms.values import clipped_value_loss, generalised_advantages
from coterie.recipe.objectives import LOSSES, OwnObjective
from coterie.types import BatchTotals

NAN = math.nan
GROUP_BASELINES = ("group", "leave_one_out")
PAIRS = [(b, s) for b in BASELINES for s in SCALES if b in GROUP_BASELINES or s not in ("sample", "population")]
SETTINGS = {
    "clip_low": 0.1,
    "clip_high": 0.3,
    "clip_ceiling": 2.0,
    "gate_positive": 1.0,
    "gate_negative": 1.25,
    "anchor_alpha": 0.4,
    "anchor_beta": 1.5,
}
KINDS = {
    "ratio": tuple(RATIOS),
    "clip_bounds": ("fixed", "dynamic"),
    "anchor_level": ("token", "sequence"),
    "anchor_weight": ("advantage", "reward"),
}
OBJECTIVE_SETTINGS = {name: kind().keywords.keys() for name, kind in LOSSES.kinds.items()}


def settings_of(name: str) -> list[dict]:
    """Every combination of the settings of an objective that are a choice, with the numbers above for the rest."""
    combinations: list[dict] = [{key: SETTINGS[key] for key in OBJECTIVE_SETTINGS[name] if key in SETTINGS}]
    for key in sorted(OBJECTIVE_SETTINGS[name] & KINDS.keys()):
        combinations = [{**chosen, key: kind} for chosen in combinations for kind in KINDS[key]]
    return combinations


VARIANTS = [
    pytest.param(name, chosen, id="-".join([name, *(str(v) for v in chosen.values() if isinstance(v, str))]))
    for name in OBJECTIVE_SETTINGS
    for chosen in settings_of(name)
]
SMOOTH = [v for v in VARIANTS if v.values[0] != "cispo" and v.values[1].get("ratio") != "sequence_mean_token"]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Data: completions of different lengths, whose ratios lie inside and outside of every bound


def batch_of(seed: int, lengths: tuple[int, ...] = (3, 1, 5, 2), spread: float = 0.6) -> TokenTerms:
    """Advantages are positive, negative and zero, and differ from the rewards."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    old = -3 * torch.rand(num_tokens, generator=generator, dtype=torch.float64)  # some rare, some likelier than 4 * low
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    advantages[-1] = 0
    return TokenTerms(
        policy_logprobs=old + spread * torch.randn(num_tokens, generator=generator, dtype=torch.float64),
        old_logprobs=old,
        advantages=advantages[row],
        rewards=torch.randn(len(lengths), generator=generator, dtype=torch.float64)[row],
        row=row,
        num_rows=len(lengths),
        reference_logprobs=old + torch.randn(num_tokens, generator=generator, dtype=torch.float64),
    )


def with_policy(terms: TokenTerms, policy_logprobs: Tensor) -> TokenTerms:
    return TokenTerms(**{**vars(terms), "policy_logprobs": policy_logprobs})


# References in plain loops


def rows_of(terms: TokenTerms) -> list[list[int]]:
    """The places of each completion's tokens."""
    return [[n for n, row in enumerate(terms.row.tolist()) if row == number] for number in range(terms.num_rows)]


def slow_ratios(terms: TokenTerms, kind: str) -> list[float]:
    new, old = terms.policy_logprobs.tolist(), terms.old_logprobs.tolist()
    ratios = [math.exp(a) / math.exp(b) for a, b in zip(new, old, strict=True)]
    for places in rows_of(terms):
        product = math.prod(ratios[n] for n in places)
        for n in places:
            if kind == "sequence":
                ratios[n] = product
            elif kind in ("sequence_mean", "sequence_mean_token"):
                ratios[n] = product ** (1 / len(places))
    return ratios


def slow_bounds(terms: TokenTerms, kind: str, low: float, high: float) -> list[tuple[float, float]]:
    """The least and the largest ratio of each token, by DCPO's cases where they depend on the token."""
    if kind == "fixed":
        return [(1 - low, 1 + high)] * len(terms.row)
    bounds = []
    for q in (math.exp(x) for x in terms.old_logprobs.tolist()):
        least = 0.5 + 0.5 * math.sqrt(1 - 4 * low / q) if q >= 4 * low else 0.5
        bounds.append((least, min(10.0, 0.5 + 0.5 * math.sqrt(1 + 4 * high / q))))
    return bounds


def slow_clip(terms: TokenTerms, *, ratio: str, clip_low: float, clip_high: float, clip_bounds: str) -> list[float]:
    losses = []
    bounds = slow_bounds(terms, clip_bounds, clip_low, clip_high)
    for r, advantage, (least, most) in zip(slow_ratios(terms, ratio), terms.advantages.tolist(), bounds, strict=True):
        losses.append(-min(r * advantage, max(least, min(most, r)) * advantage))
    return losses


def slow_dual_clip(terms: TokenTerms, *, clip_ceiling: float, **others) -> list[float]:
    losses = []
    for loss, advantage in zip(slow_clip(terms, **others), terms.advantages.tolist(), strict=True):
        objective = -loss if advantage >= 0 else max(-loss, clip_ceiling * advantage)
        losses.append(-objective)
    return losses


def slow_cispo(terms: TokenTerms, *, ratio: str, clip_low: float, clip_high: float) -> list[float]:
    return [
        -max(1 - clip_low, min(1 + clip_high, r)) * advantage * logprob
        for r, advantage, logprob in zip(
            slow_ratios(terms, ratio), terms.advantages.tolist(), terms.policy_logprobs.tolist(), strict=True
        )
    ]


def slow_sapo(terms: TokenTerms, *, ratio: str, gate_positive: float, gate_negative: float) -> list[float]:
    losses = []
    for r, advantage in zip(slow_ratios(terms, ratio), terms.advantages.tolist(), strict=True):
        tau = gate_positive if advantage > 0 else gate_negative
        losses.append(-4 / tau / (1 + math.exp(-tau * (r - 1))) * advantage)
    return losses


def slow_gmpo(terms: TokenTerms, *, clip_low: float, clip_high: float) -> list[float]:
    losses = [0.0] * len(terms.row)
    ratios = slow_ratios(terms, "token")
    for places in rows_of(terms):
        advantage = terms.advantages[places[0]].item()
        product = 1.0
        for n in places:
            inside = max(math.exp(-clip_low), min(math.exp(clip_high), ratios[n]))
            product *= min(ratios[n], inside) if advantage > 0 else max(ratios[n], inside)
        for n in places:
            losses[n] = -(product ** (1 / len(places))) * advantage
    return losses


def slow_policy_gradient(terms: TokenTerms, *, ratio: str) -> list[float]:
    return [-r * a for r, a in zip(slow_ratios(terms, ratio), terms.advantages.tolist(), strict=True)]


def slow_anchored(
    terms: TokenTerms, *, anchor_alpha: float, anchor_beta: float, anchor_level: str, anchor_weight: str
) -> list[float]:
    losses = [0.0] * len(terms.row)
    weights = (terms.rewards if anchor_weight == "reward" else terms.advantages).tolist()
    policy, reference = (
        [math.exp(x) for x in logprobs.tolist()] for logprobs in (terms.policy_logprobs, terms.reference_logprobs)
    )
    for completion in rows_of(terms):
        for places in [completion] if anchor_level == "sequence" else [[n] for n in completion]:
            p, r = (math.prod(probabilities[n] for n in places) for probabilities in (policy, reference))
            z = math.log(p / (anchor_alpha * p + (1 - anchor_alpha) * r))
            for n in places:
                losses[n] = -weights[n] * math.log(1 / (1 + math.exp(-anchor_beta * z)))
    return losses


SLOW: dict[str, Callable[..., list[float]]] = {
    "clip": slow_clip,
    "dual_clip": slow_dual_clip,
    "cispo": slow_cispo,
    "sapo": slow_sapo,
    "gmpo": slow_gmpo,
    "policy_gradient": slow_policy_gradient,
    "anchored": slow_anchored,
}


def slow_advantages(rewards: list[list[float]], baseline: str, scale: str, epsilon: float) -> list[list[float]]:
    """From the definitions; NaN abstains. Groups without signal are left to tests of their own."""
    valid = [[r for r in group if not math.isnan(r)] for group in rewards]
    everything = [r for group in valid for r in group]

    def baseline_of(number: int, place: int) -> float:
        if baseline == "group":
            return sum(valid[number]) / len(valid[number])
        if baseline == "leave_one_out":
            others = [r for n, r in enumerate(rewards[number]) if n != place and not math.isnan(r)]
            return sum(others) / len(others)
        return sum(everything) / len(everything) if baseline == "batch" else 0.0

    differences = [
        [NAN if math.isnan(r) else r - baseline_of(number, place) for place, r in enumerate(group)]
        for number, group in enumerate(rewards)
    ]
    of_batch = [d for group in differences for d in group if not math.isnan(d)]
    divisors = {
        "sample": lambda number: statistics.stdev(valid[number]) + epsilon,
        "population": lambda number: statistics.pstdev(valid[number]) + epsilon,
        "none": lambda number: 1.0,
        "batch": lambda number: statistics.stdev(everything) + epsilon,
        "batch_differences": lambda number: statistics.stdev(of_batch) + epsilon,
    }
    return [
        [0.0 if math.isnan(d) else d / divisors[scale](number) for d in group]
        for number, group in enumerate(differences)
    ]


# Objectives


def test_the_settings_of_each_objective_are_its_keywords():
    """So a recipe can't set what does nothing, and an objective gets all that it needs."""
    assert set(LOSSES.kinds) == set(OBJECTIVES) == set(SLOW)
    for name, objective in OBJECTIVES.items():
        parameters = inspect.signature(objective.loss).parameters.values()
        assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == OBJECTIVE_SETTINGS[name], name
        assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == ["terms"], name
    of_own = OwnObjective(objective="mine.py:f").keywords.keys()
    assert SETTINGS.keys() | KINDS.keys() == of_own == set().union(*OBJECTIVE_SETTINGS.values())


@pytest.mark.parametrize(("name", "chosen"), [(name, chosen) for name in OBJECTIVES for chosen in settings_of(name)])
def test_an_objective_says_of_itself_what_the_trainer_asks(name, chosen):
    """Where its bounds act there is no gradient, and where the advantage is 0 none either; the reference is used where it is asked for."""
    terms, kind = batch_of(3, lengths=(9, 7, 12, 3, 8), spread=1.0), LOSSES.kinds[name]
    policy = terms.policy_logprobs.clone().requires_grad_()
    per_token = OBJECTIVES[name].loss(with_policy(terms, policy), **chosen)
    (gradient,) = torch.autograd.grad(per_token.sum(), policy)
    if kind.by_advantage:
        assert not gradient[terms.advantages == 0].any()
    elif chosen["anchor_weight"] == "reward":
        assert gradient[terms.advantages == 0].any()
    without = TokenTerms(**{**vars(terms), "reference_logprobs": None})
    with pytest.raises(AssertionError) if kind.needs_reference else nullcontext():
        OBJECTIVES[name].loss(without, **chosen)
    if (clipped := OBJECTIVES[name].clipped) is not None:
        low, high = clipped(terms, **chosen)
        if name in ("clip", "gmpo") and chosen.get("ratio", "token") == "token":
            assert low.any()
            assert high.any()
            assert torch.equal(gradient == 0, low | high | (terms.advantages == 0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "chosen"), VARIANTS)
def test_the_objective_is_its_formula(name, chosen, seed):
    terms = batch_of(seed)
    got = OBJECTIVES[name].loss(terms, **chosen)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(SLOW[name](terms, **chosen), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(("name", "chosen"), SMOOTH)
def test_the_gradient_is_the_finite_difference(name, chosen):
    """Where no part of the value has its gradient stopped on purpose: those slopes are tested in closed form below."""
    terms = batch_of(7)
    policy = terms.policy_logprobs.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logprobs: OBJECTIVES[name].loss(with_policy(terms, logprobs), **chosen), policy
    )


def gradient_of(loss: Callable[[Tensor], Tensor], at: Tensor) -> list[float]:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(loss(at).sum(), at)[0].tolist()


@pytest.mark.parametrize("kind", RATIOS)
def test_every_token_of_cispo_keeps_a_gradient(kind):
    """-clip(ratio) * A exactly: the clipped ratio is a weight, through which nothing flows."""
    terms = batch_of(3)
    got = gradient_of(
        lambda x: OBJECTIVES["cispo"].loss(with_policy(terms, x), ratio=kind, clip_low=0.2, clip_high=0.3),
        terms.policy_logprobs,
    )
    ratios = slow_ratios(terms, kind)
    expected = [-max(0.8, min(1.3, r)) * a for r, a in zip(ratios, terms.advantages.tolist(), strict=True)]
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert any(not 0.8 <= r <= 1.3 for r in ratios)


def test_the_soft_gate_falls_off_on_both_sides():
    """The slope in the ratio is 4 * s * (1 - s) * A with s = sigmoid(tau * (ratio - 1)): A at 1, less elsewhere."""
    ratio = tensor(0.2, 0.7, 1.0, 1.5, 3.0)
    for advantage, tau in ((2.0, 1.5), (-2.0, 4.0)):
        got = gradient_of(lambda r, a=advantage: sapo_loss(r, torch.full_like(r, a), positive=1.5, negative=4.0), ratio)
        gates = [1 / (1 + math.exp(-tau * (r - 1))) for r in ratio.tolist()]
        assert got == pytest.approx([-4 * gate * (1 - gate) * advantage for gate in gates], rel=1e-12)
        assert got[2] == pytest.approx(-advantage, rel=1e-15)
        assert all(abs(slope) < abs(advantage) for n, slope in enumerate(got) if n != 2)


def test_equal_bounds_are_ppo_s_clip_for_every_ratio_and_sign():
    """PPO, by its cases: beyond 1 + epsilon a good token earns no more, below 1 - epsilon a bad one costs no less."""
    for r in (0.1, 0.79, 0.81, 1.0, 1.19, 1.21, 4.0):
        for advantage in (-3.0, -0.5, 0.0, 0.5, 3.0):
            held = min(r, 1.2) if advantage > 0 else max(r, 0.8)
            got = clipped_loss(tensor(r), tensor(advantage), low=0.2, high=0.2).item()
            assert got == pytest.approx(-held * advantage, abs=1e-15)


@given(
    ratio=st.lists(st.floats(0.01, 20), min_size=1, max_size=8),
    advantage=st.floats(0.001, 5),
    ceiling=st.floats(1.5, 5),
)
@settings(max_examples=60, deadline=None)
def test_dual_clip_acts_only_on_bad_tokens_that_became_likely(ratio, advantage, ceiling):
    """For A >= 0 it is the clip; for A < 0 the loss is at most ceiling * |A|, and the clip's wherever that is less."""
    ratio = tensor(*ratio)
    for value in (advantage, 0.0, -advantage):
        advantages = torch.full_like(ratio, value)
        plain = clipped_loss(ratio, advantages, low=0.2, high=0.3)
        dual = dual_clipped_loss(ratio, advantages, low=0.2, high=0.3, ceiling=ceiling)
        if value >= 0:
            assert torch.equal(dual, plain)
        else:
            assert dual.tolist() == pytest.approx([min(x, ceiling * advantage) for x in plain.tolist()], rel=1e-14)


def test_beyond_the_ceiling_the_dual_clip_has_no_gradient():
    ratio, advantages = tensor(0.5, 1.0, 2.9, 3.1, 50.0), tensor(-2, -2, -2, -2, -2)
    got = gradient_of(lambda r: dual_clipped_loss(r, advantages, low=0.2, high=0.2, ceiling=3.0), ratio)
    assert got == [0.0, 2.0, 2.0, 0.0, 0.0]


@given(q=st.floats(1e-4, 1), low=st.floats(0.01, 0.24), high=st.floats(0.01, 0.5))
@settings(max_examples=150, deadline=None)
def test_at_a_dynamic_bound_the_ratio_uses_up_its_epsilon(q, low, high):
    """|r - 1| * r * q = epsilon, where no cap acts; at a cap the ratio is 1/2, or 10, and has used less."""
    lower, upper = (bound.item() for bound in dynamic_bounds(tensor(math.log(q)), low=low, high=high))
    least, most = 1 - lower, 1 + upper
    if q > 4 * low:
        assert (1 - least) * least * q == pytest.approx(low, rel=1e-6)
        assert 0.5 <= least < 1
    else:
        assert least == pytest.approx(0.5, abs=1e-7)
        assert (1 - least) * least * q <= low * (1 + 1e-6)
    if most < 10 - 1e-9:
        assert (most - 1) * most * q == pytest.approx(high, rel=1e-6)
    else:
        assert most == pytest.approx(10)
        assert 90 * q <= high * (1 + 1e-6)


def test_rarer_tokens_have_wider_dynamic_bounds():
    """Strictly where no cap acts: below 4 epsilon for the lower one, below epsilon / 90 for the upper one."""
    probabilities = [1.0, 0.9, 0.7, 0.5, 0.1, 0.01, 1e-4, 1e-8]
    low, high = dynamic_bounds(tensor(*probabilities).log(), low=0.1, high=0.2)
    assert all(wider > narrower for narrower, wider in zip(low[:4].tolist(), low[1:4].tolist(), strict=False))
    assert low[4:].tolist() == pytest.approx([0.5] * 4)
    assert all(wider > narrower for narrower, wider in zip(high[:6].tolist(), high[1:6].tolist(), strict=False))
    assert high[6:].tolist() == pytest.approx([9.0, 9.0])


def test_dynamic_bounds_follow_the_sampler_and_not_the_policy():
    """No gradient flows through them, and a token rarer under the policy alone has no more room."""
    terms = batch_of(2)
    moved = with_policy(terms, terms.policy_logprobs - 3)
    chosen = terms.bounds("dynamic", 0.1, 0.2)
    for one, other in zip(chosen, moved.bounds("dynamic", 0.1, 0.2), strict=True):
        assert torch.equal(one, other)
    assert not any(bound.requires_grad for bound in dynamic_bounds(tensor(-1.0).requires_grad_(), low=0.1, high=0.2))


def test_the_largest_dynamic_ratio_is_a_setting():
    _, high = dynamic_bounds(tensor(-30.0), low=0.1, high=0.2, largest=4.0)
    assert high.item() == 3.0


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_gmpo_of_one_token_is_the_clip_on_one_side(advantage):
    """One token's geometric mean is its ratio, held at exp(high) if good and at exp(-low) if bad."""
    log_ratio = tensor(-0.9, -0.1, 0.0, 0.1, 0.9)
    got = gmpo_loss(log_ratio, torch.full_like(log_ratio, advantage), torch.arange(5), 5, low=0.4, high=0.3)
    held = [min(x, 0.3) if advantage > 0 else max(x, -0.4) for x in log_ratio.tolist()]
    assert got.tolist() == pytest.approx([-math.exp(x) * advantage for x in held], rel=1e-14)


def test_gmpo_stops_a_clipped_token_and_not_its_completion():
    """Log-ratios 1 and 0.2, A = 1, bound 0.4: the mean is 0.3, and only the second token has a gradient: half of it."""
    got = gradient_of(
        lambda x: gmpo_loss(x, tensor(1, 1), torch.tensor([0, 0]), 1, low=0.4, high=0.4)[:1], tensor(1.0, 0.2)
    )
    assert got == pytest.approx([0.0, -math.exp(0.3) / 2], rel=1e-14)


def test_the_policy_gradient_clips_nothing():
    ratio, advantages = tensor(0.01, 1.0, 40.0), tensor(2.0, -2.0, 3.0)
    assert policy_gradient_loss(ratio, advantages).tolist() == pytest.approx([-0.02, 2.0, -120.0])
    assert gradient_of(lambda r: policy_gradient_loss(r, advantages), ratio) == [-2.0, 2.0, -3.0]


@pytest.mark.parametrize(("name", "chosen"), VARIANTS)
def test_rows_of_different_length_do_not_leak_into_one_another(name, chosen):
    """Each completion alone has the losses that it has in a batch, and another one's tokens move nothing."""
    terms = batch_of(5, lengths=(4, 1, 2, 6))
    policy = terms.policy_logprobs.clone().requires_grad_()
    together = OBJECTIVES[name].loss(with_policy(terms, policy), **chosen)
    for number, places in enumerate(rows_of(terms)):
        alone = TokenTerms(
            **{key: value[places] for key, value in vars(terms).items() if isinstance(value, Tensor) and key != "row"},
            row=torch.zeros(len(places), dtype=torch.long),
            num_rows=1,
        )
        slope = torch.autograd.grad(together[places].sum(), policy, retain_graph=True)[0]
        assert (slope[terms.row != number] == 0).all()
        torch.testing.assert_close(
            OBJECTIVES[name].loss(alone, **chosen), together[places].detach(), rtol=1e-13, atol=0
        )


@pytest.mark.parametrize(("name", "chosen"), VARIANTS)
def test_the_order_of_a_batch_does_not_matter(name, chosen):
    """Tokens need not stand together: each says which completion it belongs to."""
    terms = batch_of(6)
    order = torch.randperm(len(terms.row), generator=torch.Generator().manual_seed(0))
    moved = TokenTerms(
        **{key: value[order] if isinstance(value, Tensor) else value for key, value in vars(terms).items()}
    )
    torch.testing.assert_close(
        OBJECTIVES[name].loss(moved, **chosen), OBJECTIVES[name].loss(terms, **chosen)[order], rtol=1e-13, atol=1e-15
    )


@given(
    name_and_settings=st.sampled_from([(name, chosen) for name in OBJECTIVE_SETTINGS for chosen in settings_of(name)]),
    tokens=st.lists(
        st.tuples(*[st.floats(-1e4, 0, width=32)] * 3, st.integers(0, 2)), min_size=1, max_size=6
    ),  # policy, sampler, reference, row
    of_row=st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=300, deadline=None)
def test_no_log_probability_gives_nan(name_and_settings, tokens, of_row, dtype):
    """However far policy, sampler and reference lie apart: neither in the loss nor in its gradient."""
    name, chosen = name_and_settings
    policy, old, reference, row = zip(*tokens, strict=True)
    row = torch.tensor(row)
    policy = torch.tensor(policy, dtype=dtype, requires_grad=True)
    weights = torch.tensor(of_row, dtype=dtype)[row]
    terms = TokenTerms(
        policy, torch.tensor(old, dtype=dtype), weights, weights, row, 3, torch.tensor(reference, dtype=dtype)
    )
    loss = OBJECTIVES[name].loss(terms, **chosen)
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), policy)[0].isfinite().all()


NOTHING, LIKELY, ROW = tensor(0.0), tensor(math.inf), torch.tensor([0])


@pytest.mark.parametrize(
    "loss",
    [
        lambda ratio: clipped_loss(ratio, NOTHING, low=0.2, high=math.inf),
        lambda ratio: dual_clipped_loss(ratio, NOTHING, low=0.2, high=0.2, ceiling=3.0),
        lambda ratio: cispo_loss(-ratio, ratio, NOTHING, low=0.2, high=0.2),
        lambda ratio: sapo_loss(ratio, NOTHING, positive=1.0, negative=1.0),
        lambda ratio: gmpo_loss(ratio, NOTHING, ROW, 1, low=0.4, high=0.4),
        lambda ratio: policy_gradient_loss(ratio, NOTHING),
        lambda ratio: anchored_loss(-ratio, NOTHING, NOTHING, alpha=0.5, beta=1.0),
    ],
    ids=["clip", "dual clip", "cispo", "sapo", "gmpo", "policy gradient", "anchored"],
)
def test_no_advantage_is_no_loss_even_at_an_infinite_ratio(loss):
    """0 * inf is no number, and 0 is meant."""
    assert loss(LIKELY).tolist() == [0.0]


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "anchored"])
@given(
    value=st.floats(-(2.0**15), 2.0**15, width=16),
    num_abstaining=st.integers(0, 2),
    size=st.integers(1, 8),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    scale=st.sampled_from(SCALES),
    aggregation=st.sampled_from(sorted(AGGREGATIONS)),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_a_flat_group_has_no_gradient_at_all(
    name, baseline, value, num_abstaining, size, dtype, scale, aggregation, data
):
    """Exactly zero, whatever the reward, the type of the rewards and the objective, and whatever another group does."""
    flat = [value] * size + [NAN] * num_abstaining
    rewards = torch.tensor([flat, list(range(len(flat)))], dtype=dtype)
    advantages = group_advantages(rewards, baseline=baseline, scale=scale)[0].float()
    chosen = data.draw(st.sampled_from(settings_of(name)))
    lengths = torch.tensor([1 + n % 3 for n in range(len(flat))])
    row = torch.arange(len(flat)).repeat_interleave(lengths)
    old = -torch.linspace(0.1, 3, len(row))
    policy = (old * 1.3 + 0.2).requires_grad_()
    terms = TokenTerms(policy, old, advantages[row], torch.zeros(len(row)), row, len(flat))
    totals = BatchTotals(num_rows=2 * len(flat), num_tokens=2 * len(row), max_length=4)
    loss = aggregate(OBJECTIVES[name].loss(terms, **chosen), row, lengths, aggregation=aggregation, totals=totals)
    loss.backward()
    assert loss.item() == 0
    assert (policy.grad == 0).all()


def test_a_flat_group_leaves_the_anchored_loss_without_gradient():
    terms = batch_of(1)
    policy = terms.policy_logprobs.clone().requires_grad_()
    for level in ("token", "sequence"):
        silent = TokenTerms(**{**vars(terms), "policy_logprobs": policy, "advantages": torch.zeros_like(policy)})
        loss = OBJECTIVES["anchored"].loss(
            silent, anchor_alpha=0.5, anchor_beta=1.0, anchor_level=level, anchor_weight="advantage"
        )
        assert (loss == 0).all()
        assert (torch.autograd.grad(loss.sum(), policy)[0] == 0).all()


def test_the_mixture_is_made_in_logarithms():
    """Probabilities of 1e-400 are zero in float64; their mixture's logarithm is not."""
    logprob = -400 * math.log(10)
    got = anchor_logprobs(tensor(logprob), tensor(logprob - 1), alpha=0.25).item()
    assert got == pytest.approx(logprob + math.log(0.25 + 0.75 / math.e), rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_anchored_loss_where_the_reference_disagrees_fully(dtype):
    """z = -log(alpha) where only the policy likes it, hence no gradient; z = -1e4 where only the reference does."""
    policy, reference = torch.tensor([-1.0, -1e4], dtype=dtype), torch.tensor([-1e4, 0.0], dtype=dtype)
    policy.requires_grad_()
    loss = anchored_loss(policy, reference, torch.ones(2, dtype=dtype), alpha=0.5, beta=1.0)
    assert loss.tolist() == pytest.approx([math.log(1.5), 1e4 + math.log(0.5)], rel=1e-6)
    assert torch.autograd.grad(loss.sum(), policy)[0].tolist() == [0.0, -1.0]


# Ratios


@pytest.mark.parametrize("kind", RATIOS)
def test_the_ratio_is_its_formula(kind):
    for seed in range(3):
        terms = batch_of(seed)
        assert terms.ratio(kind).tolist() == pytest.approx(slow_ratios(terms, kind), rel=1e-12)


def test_one_token_completions_make_every_kind_the_token_ratio():
    terms = batch_of(4, lengths=(1,) * 6)
    token = terms.ratio("token")
    for kind in RATIOS:
        torch.testing.assert_close(terms.ratio(kind), token, rtol=1e-14, atol=0)


@given(
    rows=st.lists(st.lists(st.floats(-4, 4).map(lambda x: round(x, 3)), min_size=1, max_size=5), min_size=1, max_size=4)
)
@settings(max_examples=60, deadline=None)
def test_gspo_token_has_gspo_s_value_and_each_token_s_gradient(rows):
    """Its derivative by a token's own log-ratio is the completion's ratio; by every other one's it is zero."""
    row = torch.tensor([number for number, values in enumerate(rows) for _ in values])
    log_ratio = tensor(*[value for values in rows for value in values]).requires_grad_()
    got = sequence_mean_token_ratio(log_ratio, row, len(rows))
    mean = [math.exp(math.fsum(values) / len(values)) for values in rows for _ in values]
    assert got.tolist() == pytest.approx(mean, rel=1e-13)
    jacobian = torch.autograd.functional.jacobian(lambda x: sequence_mean_token_ratio(x, row, len(rows)), log_ratio)
    torch.testing.assert_close(jacobian, torch.diag(tensor(*mean)), rtol=1e-13, atol=0)


def test_gspo_token_is_gspo_where_a_completion_has_one_advantage():
    """Summed over a completion, the two losses have the same gradient; with an advantage per token they have not."""
    terms = batch_of(8, lengths=(3, 4))

    def gradients(advantages: Tensor) -> list[list[float]]:
        return [
            gradient_of(
                lambda x, kind=kind: clipped_loss(RATIOS[kind](x, terms.row, 2), advantages, low=0.9, high=9),
                terms.log_ratio,
            )
            for kind in ("sequence_mean", "sequence_mean_token")
        ]

    one, other = gradients(terms.advantages)
    assert one == pytest.approx(other, rel=1e-12, abs=1e-15)
    one, other = gradients(terms.rewards + torch.arange(7))
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.1


@pytest.mark.parametrize("kind", RATIOS)
def test_a_ratio_too_large_to_represent_is_held_without_gradient(kind):
    log_ratio = torch.full((2,), 2 * MAX_LOG_RATIO, requires_grad=True)
    ratio = RATIOS[kind](log_ratio, torch.tensor([0, 0]), 1)
    assert ratio.tolist() == pytest.approx([math.exp(MAX_LOG_RATIO)] * 2, rel=1e-5)
    assert torch.autograd.grad(ratio.sum(), log_ratio)[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
@pytest.mark.parametrize("limit", [1.2, 2.0])
def test_importance_weights_are_truncated_or_masked(level, limit):
    """pi_old / pi_sampler: at most the limit, or zero outside of [1 / limit, limit].

    A completion is masked as a whole.
    """
    num_cut = 0
    for seed in range(4):
        terms = batch_of(seed, spread=1.2)
        plain = slow_ratios(terms, level)
        truncated, masked = (
            importance_weights(
                terms.policy_logprobs,
                terms.old_logprobs,
                terms.row,
                terms.num_rows,
                level=level,
                kind=kind,
                limit=limit,
            ).tolist()
            for kind in ("truncate", "mask")
        )
        assert truncated == pytest.approx([min(r, limit) for r in plain], rel=1e-12)
        assert masked == pytest.approx([r if 1 / limit <= r <= limit else 0.0 for r in plain], rel=1e-12)
        num_cut += masked.count(0.0)
    assert num_cut > 0


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_importance_weights_are_constant_and_1_on_the_policy(kind):
    logprobs = tensor(-1.0, -2.0, -0.1).requires_grad_()
    row = torch.tensor([0, 0, 1])
    for level in ("token", "sequence", "sequence_mean"):
        weights = importance_weights(logprobs, logprobs, row, 2, level=level, kind=kind, limit=2.0)
        assert weights.tolist() == [1.0, 1.0, 1.0]
        assert not weights.requires_grad


def test_importance_weights_give_the_old_policy_s_expected_loss():
    """Enumerated over four tokens: samples of another engine, weighted, are as good as the old policy's own."""
    old, sampler, policy = (batch_of(seed, lengths=(4,)).old_logprobs.log_softmax(0) for seed in (1, 2, 3))
    row = torch.arange(4)
    weights = importance_weights(old, sampler, row, 4, level="token", kind="truncate", limit=1e6)
    loss = clipped_loss((policy - old).exp(), tensor(1.0, -2.0, 0.5, 0.0), low=0.2, high=0.2)
    assert (sampler.exp() * weights * loss).sum().item() == pytest.approx((old.exp() * loss).sum().item(), rel=1e-13)


# The KL between equal policies


@given(values=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=6), shift=st.floats(-5, 5, width=32))
@settings(max_examples=60, deadline=None)
def test_equal_policies_have_a_kl_of_exactly_zero(values, shift):
    """In float32, exactly and with no gradient to speak of; a constant added to all logits is the same policy."""
    policy = torch.tensor([values], requires_grad=True)
    kl = exact_kl(policy, policy.detach())
    assert kl.item() == 0
    assert torch.autograd.grad(kl.sum(), policy)[0].abs().max() < 1e-6
    logprobs = policy.log_softmax(-1)
    assert (k3(logprobs.detach() - logprobs) == 0).all()
    assert exact_kl(policy + shift, policy).abs().item() < 1e-4


def test_the_exact_kl_by_hand():
    """Probabilities 1/2, 1/2, 0 against 1/4, 3/4, 0: log(2) / 2 + log(2 / 3) / 2.

    What neither can write adds nothing.
    """
    excluded = -math.inf
    policy = tensor(math.log(0.5), math.log(0.5), excluded)[None].requires_grad_()
    reference = tensor(math.log(0.25), math.log(0.75), excluded)[None]
    kl = exact_kl(policy, reference)
    assert kl.item() == pytest.approx((math.log(2) + math.log(2 / 3)) / 2, abs=1e-15)
    # The derivative by logit i is p_i * (log(p_i / q_i) - KL).
    expected = [0.5 * (math.log(2) - kl.item()), 0.5 * (math.log(2 / 3) - kl.item()), 0.0]
    assert torch.autograd.grad(kl.sum(), policy)[0][0].tolist() == pytest.approx(expected, abs=1e-15)
    assert exact_kl(policy, tensor(0.0, excluded, excluded)[None]).item() == math.inf


# Advantages

GROUPS = [[1.0, 4.0, NAN, 0.5], [-2.0, NAN, 3.0, NAN], [10.0, 9.0, 8.5, NAN]]


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
@pytest.mark.parametrize(("baseline", "scale"), PAIRS)
def test_the_advantage_is_its_formula(baseline, scale, epsilon):
    got = group_advantages(tensor(*GROUPS), baseline=baseline, scale=scale, epsilon=epsilon)
    for row, expected in zip(got.tolist(), slow_advantages(GROUPS, baseline, scale, epsilon), strict=True):
        assert row == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_baselines_worked_by_hand():
    """Rewards 0, 3 and 6, 9: the others' means are 3, 0 and 9, 6; the batch's mean is 4.5."""
    rewards = tensor([0, 3], [6, 9])
    expected = {
        "group": [[-1.5, 1.5], [-1.5, 1.5]],
        "leave_one_out": [[-3, 3], [-3, 3]],
        "batch": [[-4.5, -1.5], [1.5, 4.5]],
        "none": [[0, 3], [6, 9]],
    }
    for baseline, advantages in expected.items():
        assert group_advantages(rewards, baseline=baseline, scale="none").tolist() == advantages
    # Squares about 4.5: 20.25 + 2.25 + 2.25 + 20.25 = 45, over 3. Squares of the differences: 4 * 2.25 = 9, over 3.
    for scale, variance in {"batch": 15, "batch_differences": 3}.items():
        got = group_advantages(rewards, baseline="group", scale=scale, epsilon=0.0)
        assert got.flatten().tolist() == pytest.approx([x / math.sqrt(variance) for x in (-1.5, 1.5, -1.5, 1.5)])


def test_an_unknown_baseline_is_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"'mean'.*group, leave_one_out, batch, none"):
        group_advantages(torch.zeros(1, 2), baseline="mean")


eighths = st.integers(-800, 800).map(lambda x: x / 8)
rewards_of_a_group = st.lists(eighths, min_size=2, max_size=8)


@given(
    rewards=st.sampled_from([2, 3, 5]).flatmap(lambda size: st.lists(eighths, min_size=size, max_size=size)),
    scale=st.sampled_from(SCALES),
)
@settings(max_examples=80, deadline=None)
def test_leave_one_out_is_the_group_mean_stretched(rewards, scale):
    """By G / (G - 1), G being those that did not abstain; the std of the batch's differences is stretched with them."""
    rewards = tensor(*rewards, NAN)[None]
    others, mean = (
        group_advantages(rewards, baseline=baseline, scale=scale, epsilon=0.0) for baseline in GROUP_BASELINES[::-1]
    )
    size = rewards.shape[1] - 1
    factor = 1 if scale == "batch_differences" else size / (size - 1)
    torch.testing.assert_close(others, factor * mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
@given(rewards=rewards_of_a_group, constant=st.integers(-(2**20), 2**20), scale=st.sampled_from(SCALES))
@settings(max_examples=100, deadline=None)
def test_adding_a_constant_to_a_group_changes_nothing(baseline, rewards, constant, scale):
    """Rewards are eighths and the constant is whole, so that the sums are exact; what rounding costs is bounded."""
    if scale == "batch":  # the std of the batch sees how far groups lie apart
        groups, moved = [rewards], [[r + constant for r in rewards]]
    else:
        groups, moved = [rewards, rewards[::-1]], [rewards, [r + constant for r in rewards[::-1]]]
    plain, shifted = (group_advantages(tensor(*x), baseline=baseline, scale=scale) for x in (groups, moved))
    spread = statistics.pstdev(rewards)
    rounding = 16 * 2.0**-52 * (abs(constant) + 100)
    tolerance = rounding if scale == "none" or spread == 0 else rounding * (1 + 4 / spread)
    torch.testing.assert_close(shifted, plain, rtol=1e-9, atol=tolerance)


@pytest.mark.parametrize(("baseline", "scale"), PAIRS)
@given(data=st.data(), rewards=rewards_of_a_group)
@settings(max_examples=15, deadline=None)
def test_permuting_a_group_permutes_its_advantages(baseline, scale, data, rewards):
    """Another group and an abstaining completion beside it; groups without signal are left to tests of their own."""
    rewards = [*rewards, min(rewards) - 1, NAN]
    order = data.draw(st.permutations(range(len(rewards))))
    other = [float(n * n) for n in range(len(rewards))]
    plain, moved = (
        group_advantages(tensor(group, other), baseline=baseline, scale=scale)
        for group in (rewards, [rewards[n] for n in order])
    )
    torch.testing.assert_close(moved[0], plain[0, order], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moved[1], plain[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("baseline", "scale"), PAIRS)
def test_completions_that_abstain_change_nothing_for_the_others(baseline, scale):
    """Two of five abstain in each group, at different places; without them the group has three."""
    with_them = tensor([1.0, NAN, 4.0, NAN, 6.0], [NAN, -3.0, NAN, 2.0, 2.5])
    without = tensor([1.0, 4.0, 6.0], [-3.0, 2.0, 2.5])
    got = group_advantages(with_them, baseline=baseline, scale=scale)
    assert (got[with_them.isnan()] == 0).all()
    torch.testing.assert_close(
        got[~with_them.isnan()],
        group_advantages(without, baseline=baseline, scale=scale).flatten(),
        rtol=1e-13,
        atol=0,
    )


@given(
    rewards=st.lists(
        st.lists(st.one_of(st.just(NAN), st.floats(-1e4, 1e4, width=16)), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
    pair=st.sampled_from(PAIRS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
@settings(max_examples=150, deadline=None)
def test_no_reward_gives_nan(rewards, pair, dtype):
    """In any type, with any baseline and scale, and however many abstain."""
    rewards = torch.tensor(rewards, dtype=dtype)
    got = group_advantages(rewards, baseline=pair[0], scale=pair[1])
    assert got.dtype == dtype
    assert not got.isnan().any()
    assert (got[rewards.isnan()] == 0).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", GROUP_BASELINES)
@pytest.mark.parametrize(
    "rewards",
    [[[0.95]], [[0.95], [3.0]], [[NAN, NAN, NAN]], [[NAN, 0.95, NAN]], [[NAN, 0.95, 0.95], [NAN, NAN, 7.0]]],
    ids=["one of one", "groups of one", "all abstained", "one valid", "two equal and one valid"],
)
def test_a_group_with_nothing_to_compare_gets_exactly_zero(baseline, scale, rewards):
    got = group_advantages(tensor(*rewards), baseline=baseline, scale=scale)
    assert (got == 0).all()


@pytest.mark.parametrize("scale", ["none", "batch", "batch_differences"])
def test_a_batch_of_one_value_gets_exactly_0_from_its_own_mean(scale):
    """However its mean is rounded: that of ten times 0.95 is not 0.95. And one alone, and none."""
    for size in range(1, 17):
        for value in (0.95, 0.1, 1 / 3, -2.7, 1e-7, 60000.0):
            rewards = torch.tensor([[value] * size, [value] * (size - 1) + [NAN]], dtype=torch.float64)
            assert (group_advantages(rewards, baseline="batch", scale=scale) == 0).all()
    for rewards in (tensor([NAN, 0.95]), tensor([NAN, NAN])):
        assert (group_advantages(rewards, baseline="batch", scale=scale) == 0).all()


def test_without_a_baseline_the_reward_is_the_advantage():
    assert group_advantages(tensor([2.0, 2.0], [NAN, -1.0]), baseline="none", scale="none").tolist() == [
        [2, 2],
        [0, -1],
    ]
    assert group_advantages(tensor([2.0], [5.0]), baseline="none", scale="none").tolist() == [[2], [5]]


# Several rewards, normalised each then summed

PARTS = [
    [[0.0, 1.0, 1.0], [2.0, 0.0, 1.0]],
    [[100.0, 50.0, NAN], [0.0, 30.0, 10.0]],
    [[NAN, 0.2, 0.1], [0.5, 0.5, NAN]],
]
WEIGHTS = [1.0, 0.5, -2.0]


@pytest.mark.parametrize("scale", ["sample", "population"])
@pytest.mark.parametrize("baseline", GROUP_BASELINES)
def test_normalised_then_summed_is_its_formula(baseline, scale):
    """The third reward's second group is flat, and says nothing there."""
    epsilon = 1e-3
    each = [slow_advantages(part, baseline, scale, epsilon) for part in PARTS]
    total = [[sum(w * part[p][g] for w, part in zip(WEIGHTS, each, strict=True)) for g in range(3)] for p in range(2)]
    std = statistics.stdev(x for row in total for x in row)
    got = normalised_then_summed(
        [tensor(*part) for part in PARTS], WEIGHTS, baseline=baseline, scale=scale, epsilon=epsilon
    )
    for row, expected in zip(got.tolist(), total, strict=True):
        assert row == pytest.approx([x / (std + epsilon) for x in expected], rel=1e-10)


def test_equal_sums_keep_their_signal_where_spreads_differ():
    """0 + 10 and 10 + 0 are equal sums; a third completion gives the two rewards different spreads."""
    first, second = tensor([0.0, 10.0, 0.0]), tensor([10.0, 0.0, 5.0])
    got = normalised_then_summed([first, second], [1.0, 1.0], baseline="group", scale="sample")[0].tolist()
    assert abs(got[0] - got[1]) > 0.1


def test_the_size_does_not_grow_with_the_number_of_rewards():
    """The same reward once, or four times: the batch's std of the sum takes it out."""
    part = tensor([0.0, 1.0, 5.0], [2.0, 0.0, 1.0])
    one, four = (
        normalised_then_summed([part] * n, [1.0] * n, baseline="group", scale="sample", epsilon=0.0) for n in (1, 4)
    )
    torch.testing.assert_close(one, four, rtol=1e-13, atol=0)
    assert one.std().item() == pytest.approx(1, rel=1e-13)


def test_the_unit_of_a_reward_does_not_matter():
    part, other = tensor([0.0, 1.0, 5.0]), tensor([2.0, 0.0, 1.0])
    plain, scaled = (
        normalised_then_summed([part * unit, other], [1.0, 1.0], baseline="group", scale="sample") for unit in (1, 1e4)
    )
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=0)


def test_a_completion_without_rewards_gets_0_and_leaves_the_std():
    with_it = [tensor([0.0, 1.0, 5.0, NAN]), tensor([2.0, 0.0, NAN, NAN])]
    got = normalised_then_summed(with_it, [1.0, 1.0], baseline="group", scale="sample")
    without = normalised_then_summed([x[:, :3] for x in with_it], [1.0, 1.0], baseline="group", scale="sample")
    assert got[0, 3] == 0
    torch.testing.assert_close(got[:, :3], without, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "part", [[[0.95] * 3, [0.1] * 3], [[NAN] * 3, [NAN] * 3], [[NAN, 4.0, NAN], [NAN] * 3], [[0.95], [2.0]]]
)
def test_rewards_without_signal_give_exactly_zero(part, dtype):
    part = torch.tensor(part, dtype=dtype)
    got = normalised_then_summed([part, part], [1.0, 0.3], baseline="group", scale="sample")
    assert got.dtype == dtype
    assert (got == 0).all()


def test_each_reward_needs_its_weight():
    with pytest.raises(ValueError, match="shorter"):
        normalised_then_summed([torch.zeros(1, 2)] * 2, [1.0], baseline="group", scale="sample")


# Generalised advantages and the value model


def slow_generalised(
    rewards: list[float], values: list[float], discount: float, gae_lambda: float
) -> tuple[list[float], list[float]]:
    """One row, by the double sum of equation 16."""
    after = [*values, 0.0][1:]
    surprises = [r + discount * b - v for r, b, v in zip(rewards, after, values, strict=True)]
    advantages = [
        sum((discount * gae_lambda) ** i * surprise for i, surprise in enumerate(surprises[n:]))
        for n in range(len(values))
    ]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def row_data(seed: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64)
    return rewards, values, torch.tensor(lengths)


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    discount=st.sampled_from([0.0, 0.9, 1.0]),
    gae_lambda=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 100),
)
@settings(max_examples=80, deadline=None)
def test_generalised_advantages_are_the_double_sum(lengths, discount, gae_lambda, seed):
    rewards, values, row_lengths = row_data(seed, lengths)
    got = generalised_advantages(rewards, values, row_lengths, discount=discount, gae_lambda=gae_lambda)
    expected: tuple[list[float], list[float]] = ([], [])
    for row in zip(rewards.split(lengths), values.split(lengths), strict=True):
        for so_far, of_row in zip(
            expected, slow_generalised(*(x.tolist() for x in row), discount, gae_lambda), strict=True
        ):
            so_far.extend(of_row)
    for tensor_, numbers in zip(got, expected, strict=True):
        assert tensor_.tolist() == pytest.approx(numbers, rel=1e-12, abs=1e-12)


def test_generalised_advantages_by_hand():
    """Rewards 0, 0, 1; values 0.5, 0.25, 0.75; discount 1/2, gae_lambda 1/2, so that what is carried shrinks to a quarter.

    Surprises: 0.125 - 0.5 = -0.375, 0.375 - 0.25 = 0.125, 1 - 0.75 = 0.25.
    """
    advantages, returns = generalised_advantages(
        tensor(0, 0, 1), tensor(0.5, 0.25, 0.75), torch.tensor([3]), discount=0.5, gae_lambda=0.5
    )
    assert advantages.tolist() == [-0.375 + 0.125 / 4 + 0.25 / 16, 0.125 + 0.25 / 4, 0.25]
    assert returns.tolist() == [advantages[0].item() + 0.5, advantages[1].item() + 0.25, 1.0]


def test_a_trace_of_1_gives_the_return_less_the_value():
    """And the return, undiscounted, is the sum of what is still to come."""
    rewards, values, lengths = row_data(0, [4, 1, 3])
    advantages, returns = generalised_advantages(rewards, values, lengths, discount=1.0, gae_lambda=1.0)
    to_come = [sum(row[n:].tolist()) for row in rewards.split([4, 1, 3]) for n in range(len(row))]
    assert returns.tolist() == pytest.approx(to_come, rel=1e-12)
    assert advantages.tolist() == pytest.approx([r - v for r, v in zip(to_come, values.tolist(), strict=True)])


def test_a_trace_of_0_gives_the_surprise_of_one_step():
    rewards, values, lengths = row_data(1, [2, 3])
    advantages, _ = generalised_advantages(rewards, values, lengths, discount=0.9, gae_lambda=0.0)
    r, v = rewards.tolist(), values.tolist()
    after = [v[1], 0.0, v[3], v[4], 0.0]  # after a row's last token nothing follows, least of all the next row
    assert advantages.tolist() == pytest.approx([r[n] + 0.9 * after[n] - v[n] for n in range(5)], rel=1e-12)


def test_a_row_does_not_see_its_neighbours():
    """Bit by bit what it gets alone, and whatever the others hold."""
    lengths = [3, 1, 5, 2]
    rewards, values, row_lengths = row_data(2, lengths)
    together = generalised_advantages(rewards, values, row_lengths, discount=0.99, gae_lambda=0.95)
    for number, start in enumerate([0, 3, 4, 9]):
        own = slice(start, start + lengths[number])
        alone = generalised_advantages(
            rewards[own], values[own], row_lengths[number : number + 1], discount=0.99, gae_lambda=0.95
        )
        loud = [x * 1e6 + 1e6 for x in (rewards, values)]
        for changed, original in zip(loud, (rewards, values), strict=True):
            changed[own] = original[own]
        among_loud = generalised_advantages(*loud, row_lengths, discount=0.99, gae_lambda=0.95)
        for one, two, three in zip(together, alone, among_loud, strict=True):
            assert torch.equal(one[own], two)
            assert torch.equal(one[own], three[own])


def test_generalised_advantages_have_no_gradient():
    rewards, values, lengths = row_data(3, [2, 2])
    got = generalised_advantages(rewards, values.requires_grad_(), lengths, discount=1.0, gae_lambda=0.9)
    assert not any(x.requires_grad for x in got)


@given(
    numbers=st.lists(st.tuples(*[st.floats(-3, 3)] * 3), min_size=1, max_size=8), clip=st.sampled_from([0.0, 0.2, 1.5])
)
@settings(max_examples=60, deadline=None)
def test_the_clipped_value_loss_is_its_formula(numbers, clip):
    values, old, returns = (tensor(*column) for column in zip(*numbers, strict=True))
    got = clipped_value_loss(values, old, returns, clip=clip)
    expected = [max((v - r) ** 2, (max(o - clip, min(o + clip, v)) - r) ** 2) / 2 for v, o, r in numbers]
    assert got.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "slope"),
    [
        (1.1, -0.9),  # within the clip: v - R
        (1.7, 0.0),  # moved towards the return as far as it may: held at 1.5, and no gradient
        (0.2, -1.8),  # moved away from it: the unclipped error is the larger one
        (3.0, 1.0),  # beyond the return, by more than the held value lies short of it
    ],
)
def test_the_value_moves_towards_the_return_only_so_far(value, slope):
    """The old value is 1, the return 2, the clip 0.5."""

    def loss(v: Tensor) -> Tensor:
        return clipped_value_loss(v, tensor(1.0), tensor(2.0), clip=0.5)

    assert gradient_of(loss, tensor(value)) == pytest.approx([slope], abs=1e-12)
    assert torch.autograd.gradcheck(loss, tensor(value).requires_grad_())


@pytest.mark.parametrize("size", [4, 7, 8])
def test_the_factor_of_leave_one_out_has_all_digits(size):
    rewards = torch.tensor([[1.0] + [0.0] * (size - 1)], dtype=torch.float64)
    got = group_advantages(rewards, baseline="leave_one_out", scale="none")[0]
    assert got[0].item() == pytest.approx(1.0, rel=1e-14)
    assert got[1].item() == pytest.approx(-1 / (size - 1), rel=1e-14)


@pytest.mark.parametrize(("baseline", "scale"), [("none", "sample"), ("batch", "population")])
def test_a_group_s_std_goes_with_a_group_s_baseline_alone(baseline, scale):
    """A flat group has a std of 0 and a difference from the batch's mean that is not."""
    with pytest.raises(ValueError, match=baseline):
        group_advantages(torch.tensor([[0.95, 0.95, 0.95], [0.0, 1.0, 2.0]]), baseline=baseline, scale=scale)


def test_parts_that_are_normalised_each_need_a_group_s_baseline():
    with pytest.raises(ValueError, match="none"):
        normalised_then_summed([torch.ones(2, 3)], [1.0], baseline="none", scale="none")


def test_whole_number_parts_are_numbers():
    whole = torch.tensor([[0, 1, 2]])
    got = normalised_then_summed([whole], [1.0], baseline="group", scale="sample")
    torch.testing.assert_close(
        got, normalised_then_summed([whole.float()], [1.0], baseline="group", scale="sample"), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_tokens_have_no_advantages(lengths):
    lengths = torch.tensor(lengths, dtype=torch.long)
    advantages, returns = generalised_advantages(torch.zeros(0), torch.zeros(0), lengths, discount=1.0, gae_lambda=1.0)
    assert advantages.shape == returns.shape == (0,)


def test_the_gate_of_sapo_has_all_digits():
    ratio = torch.tensor([1.3], dtype=torch.float64)
    got = sapo_loss(ratio, torch.tensor([-1.0], dtype=torch.float64), positive=1.0, negative=1.05).item()
    assert got == pytest.approx(4 / 1.05 / (1 + math.exp(-1.05 * (ratio.item() - 1))), rel=1e-14)


def test_gspo_token_has_the_value_of_gspo_in_float32():
    log_ratio, row = torch.tensor([9.77, -9.7675]), torch.tensor([0, 0])
    assert torch.equal(RATIOS["sequence_mean_token"](log_ratio, row, 1), RATIOS["sequence_mean"](log_ratio, row, 1))


@pytest.mark.parametrize("policy", [-60.0, -91.0, -120.0])
def test_the_weighted_k3_is_finite_at_a_token_that_was_given_up(policy):
    """Weight times exp(d) is pi_ref / pi_old, e here, however unlikely the policy makes the token."""
    logprobs = torch.tensor([policy], requires_grad=True)
    penalty = kl_penalty(logprobs, torch.tensor([-1.0]), estimator="k3", old_logprobs=torch.tensor([-2.0]))
    assert penalty.item() == pytest.approx(math.e, rel=1e-5)
    assert torch.autograd.grad(penalty.sum(), logprobs)[0].isfinite().all()
