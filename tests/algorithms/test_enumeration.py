"""What each loss optimises, shown by summing over every completion that a toy policy can write.

The policy is a table of logits: one row per prefix, one column per token of a vocabulary of three, of which token 0
ends the completion. At most `LIMIT` tokens are written, so that there are 15 completions and 7 prefixes at which a
token is chosen. Where groups matter, every group is enumerated too, weighted by its probability. Whatever a loss claims
to optimise is computed beside it from the definition, and the gradients agree within 1e-9.

Legend: S prefixes, V tokens, N tokens of the completions of a group.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.algorithms.advantages import group_advantages
from coterie.algorithms.aggregate import aggregate
from coterie.algorithms.clip import TokenTerms
from coterie.algorithms.kl import exact_kl, kl_penalty
from coterie.algorithms.objectives import OBJECTIVES, anchor_logprobs, anchored_loss
from coterie.types import BatchTotals

END, TOKENS, LIMIT = 0, 3, 3
EXACT = 1e-9
PREFIXES = [prefix for length in range(LIMIT) for prefix in itertools.product(range(1, TOKENS), repeat=length)]
STATE = {prefix: number for number, prefix in enumerate(PREFIXES)}

Completion = tuple[int, ...]
Group = tuple[Completion, ...]
Loss = Callable[[Group], Tensor]

CLIP = {"ratio": "token", "clip_low": 0.2, "clip_high": 0.3, "clip_bounds": "fixed"}
# Settings with which an objective's gradient on the policy is that of -A * log pi for each token.
ON_THE_POLICY = {
    "clip": CLIP,
    "dual_clip": {**CLIP, "clip_ceiling": 3.0},
    "dynamic clip": {**CLIP, "clip_bounds": "dynamic"},
    "cispo": {"ratio": "token", "clip_low": 1.0, "clip_high": 4.0},
    "sapo": {"ratio": "token", "gate_positive": 2.0, "gate_negative": 3.0},
    "policy_gradient": {"ratio": "token"},
}


def all_completions(limit: int) -> list[Completion]:
    """Everything that can be written: it ends with the end token, or at the limit."""
    words = itertools.product(range(1, TOKENS), repeat=limit)
    ended = (itertools.product(range(1, TOKENS), repeat=length) for length in range(limit))
    return [(*word, END) for words_of_length in ended for word in words_of_length] + list(words)


COMPLETIONS = {limit: all_completions(limit) for limit in range(1, LIMIT + 1)}


def table(seed: int) -> Tensor:
    """Logits [S, V]: a policy."""
    return torch.randn(len(PREFIXES), TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


POLICY, SAMPLER, REFERENCE = table(1), table(2), table(3)


def reward(completion: Completion) -> float:
    """One number for the whole completion, with no pattern: it depends on every token and on the length."""
    return math.sin(1 + sum((place + 2) * (token + 1.7) for place, token in enumerate(completion))) + 0.4


def logprobs(logits: Tensor, completion: Completion) -> Tensor:
    """Log-probability of each token of a completion: [length]."""
    states = [STATE[completion[:place]] for place in range(len(completion))]
    return logits.log_softmax(1)[states, list(completion)]


def chance(logits: Tensor, completion: Completion) -> Tensor:
    return logprobs(logits, completion).sum().exp()


def expectation(logits: Tensor, value: Callable[[Completion], float | Tensor], limit: int = LIMIT) -> Tensor:
    """The expected value over every completion, differentiable in the policy that writes them."""
    return torch.stack([chance(logits, c) * value(c) for c in COMPLETIONS[limit]]).sum()


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits)[0]


def gradient_of_expected(value: Callable[[Completion], float], limit: int = LIMIT) -> Tensor:
    """The gradient, at the policy, of what it earns in expectation: [S, V]."""
    logits = POLICY.clone().requires_grad_()
    return gradient(expectation(logits, value, limit), logits)


def expected_gradient(loss: Loss, logits: Tensor, sampler: Tensor, *, size: int = 1, limit: int = LIMIT) -> Tensor:
    """The gradient of a loss of one group, expected over every group that the sampler may draw: [S, V]."""
    chances = {c: chance(sampler.detach(), c).item() for c in COMPLETIONS[limit]}
    groups = itertools.product(COMPLETIONS[limit], repeat=size)
    total = torch.stack([math.prod(chances[c] for c in group) * loss(group) for group in groups]).sum()
    return gradient(total, logits)


def terms_of(
    logits: Tensor, sampler: Tensor, group: Group, advantages: Sequence[float] | Tensor, rewards: Sequence[float]
) -> TokenTerms:
    row = torch.tensor([number for number, completion in enumerate(group) for _ in completion])

    def of_tokens(policy: Tensor) -> Tensor:
        return torch.cat([logprobs(policy, completion) for completion in group])

    return TokenTerms(
        policy_logprobs=of_tokens(logits),
        old_logprobs=of_tokens(sampler.detach()),
        advantages=torch.as_tensor(advantages, dtype=torch.float64)[row],
        rewards=torch.as_tensor(rewards, dtype=torch.float64)[row],
        row=row,
        num_rows=len(group),
        reference_logprobs=of_tokens(REFERENCE),
    )


def aggregated(per_token: Tensor, group: Group, aggregation: str) -> Tensor:
    lengths = torch.tensor([len(completion) for completion in group])
    row = torch.arange(len(group)).repeat_interleave(lengths)
    totals = BatchTotals(num_rows=len(group), num_tokens=int(lengths.sum()), max_length=LIMIT)
    return aggregate(per_token, row, lengths, aggregation=aggregation, totals=totals)


def loss_of(
    logits: Tensor,
    *,
    objective: str,
    settings: dict,
    aggregation: str = "sequence_sum",
    sampler: Tensor | None = None,
    advantages: Callable[[list[float]], Sequence[float] | Tensor] = lambda rewards: rewards,
    rewarded: Callable[[Completion], float] = reward,
) -> Loss:
    """The loss of one group as it is trained: rewards, advantages, objective, aggregation.

    Without a sampler the policy is its own. `advantages` are the rewards themselves unless given.
    """
    old = logits if sampler is None else sampler

    def loss(group: Group) -> Tensor:
        rewards = [rewarded(completion) for completion in group]
        per_token = OBJECTIVES[objective].loss(terms_of(logits, old, group, advantages(rewards), rewards), **settings)
        return aggregated(per_token, group, aggregation)

    return loss


def within_group(**choice: str) -> Callable[[list[float]], Tensor]:
    return lambda rewards: group_advantages(torch.tensor([rewards], dtype=torch.float64), **choice)[0]


def assert_same(got: Tensor, wanted: Tensor) -> None:
    assert wanted.abs().max() > 1e-3, "the gradient that is compared with must not vanish"
    torch.testing.assert_close(got, wanted, atol=EXACT, rtol=0)


def angle_between(one: Tensor, other: Tensor) -> float:
    """In radians."""
    return math.acos(min(1.0, torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), 0).item()))


@pytest.fixture
def logits() -> Tensor:
    return POLICY.clone().requires_grad_()


def test_the_completions_are_all_there_is(logits):
    """15 of them, whose probabilities sum to one."""
    assert [len(COMPLETIONS[limit]) for limit in (1, 2, 3)] == [3, 7, 15]
    for limit in (1, 2, 3):
        assert expectation(logits, lambda completion: 1.0, limit).item() == pytest.approx(1, abs=1e-14)


# The policy gradient


@pytest.mark.parametrize(("ratio", "aggregation"), [("token", "sequence_sum"), ("sequence", "sequence_mean")])
def test_with_raw_rewards_the_gradient_is_the_expected_reward_s(logits, ratio, aggregation):
    """A ratio of the whole completion stands at each of its tokens, so that their mean is taken and not their sum."""
    loss = loss_of(logits, objective="policy_gradient", settings={"ratio": ratio}, aggregation=aggregation)
    assert_same(expected_gradient(loss, logits, POLICY), -gradient_of_expected(reward))


def test_off_policy_the_whole_completion_s_ratio_is_exact(logits):
    """Sampled from another policy, the expected gradient is still that of the expected reward under the policy."""
    loss = loss_of(
        logits,
        objective="policy_gradient",
        settings={"ratio": "sequence"},
        aggregation="sequence_mean",
        sampler=SAMPLER,
    )
    assert_same(expected_gradient(loss, logits, SAMPLER), -gradient_of_expected(reward))


def test_summed_sequence_ratios_optimise_reward_times_length(logits):
    """The sum over tokens counts the one ratio of a completion as often as it has tokens."""
    loss = loss_of(logits, objective="policy_gradient", settings={"ratio": "sequence"}, sampler=SAMPLER)
    assert_same(
        expected_gradient(loss, logits, SAMPLER),
        -gradient_of_expected(lambda completion: reward(completion) * len(completion)),
    )


def test_off_the_policy_the_token_ratio_is_biased(logits):
    """It leaves out the ratio of the earlier and of the later tokens.

    What it optimises is the expected reward of choosing one token with the policy, where the sampler led to the prefix
    and writes the rest: the sum over prefixes of the sampler's visits times pi_theta(token) times the sampler's own
    value.
    """
    loss = loss_of(logits, objective="policy_gradient", settings={"ratio": "token"}, sampler=SAMPLER)
    got = expected_gradient(loss, logits, SAMPLER)
    surrogate = torch.zeros((), dtype=torch.float64)
    for prefix, token in itertools.product(PREFIXES, range(TOKENS)):
        # Visits times value: the sampler's chance of each completion through this token, over that of the token itself.
        through = [c for c in COMPLETIONS[LIMIT] if c[: len(prefix) + 1] == (*prefix, token)]
        earned = sum(chance(SAMPLER, c).item() * reward(c) for c in through)
        chosen = SAMPLER.softmax(1)[STATE[prefix], token].item()
        surrogate = surrogate + logits.softmax(1)[STATE[prefix], token] * earned / chosen
    assert_same(got, -gradient(surrogate, logits))
    assert angle_between(got, -gradient_of_expected(reward)) > 0.1


def test_off_the_policy_the_token_ratio_is_exact_for_one_token(logits):
    loss = loss_of(logits, objective="policy_gradient", settings={"ratio": "token"}, sampler=SAMPLER)
    assert_same(expected_gradient(loss, logits, SAMPLER, limit=1), -gradient_of_expected(reward, limit=1))


GROUPS = [(2, 3), (3, 2)]  # pairs of completions of up to three tokens, and triples of up to two


@pytest.mark.parametrize(("size", "limit"), GROUPS)
def test_the_others_mean_as_baseline_leaves_the_gradient_exact(logits, size, limit):
    """The mean of the others does not depend on the completion, so that it takes nothing away in expectation."""
    advantages = within_group(baseline="leave_one_out", scale="none")
    loss = loss_of(logits, objective="policy_gradient", settings={"ratio": "token"}, advantages=advantages)
    got = expected_gradient(loss, logits, POLICY, size=size, limit=limit)
    assert_same(got, -gradient_of_expected(reward, limit))


@pytest.mark.parametrize(("size", "limit"), GROUPS)
def test_the_group_mean_as_baseline_shortens_the_gradient(logits, size, limit):
    """The mean holds the completion's own reward: (G - 1) / G of the gradient is left, in the same direction."""
    advantages = within_group(baseline="group", scale="none")
    loss = loss_of(logits, objective="policy_gradient", settings={"ratio": "token"}, advantages=advantages)
    got = expected_gradient(loss, logits, POLICY, size=size, limit=limit)
    assert_same(got, -gradient_of_expected(reward, limit) * (size - 1) / size)


# The other objectives, on the policy


@pytest.mark.parametrize("name", ON_THE_POLICY)
def test_on_the_policy_the_objective_has_the_policy_gradient(logits, name):
    """Clipped, softly gated or weighted: at a ratio of one each has the slope A, so that RLOO's estimate is exact."""
    loss = loss_of(
        logits,
        objective="clip" if name == "dynamic clip" else name,
        settings=ON_THE_POLICY[name],
        advantages=within_group(baseline="leave_one_out", scale="none"),
    )
    assert_same(expected_gradient(loss, logits, POLICY, size=2), -gradient_of_expected(reward))


@pytest.mark.parametrize("name", ["clip", "dual_clip", "cispo", "sapo"])
@pytest.mark.parametrize("ratio", ["sequence_mean", "sequence_mean_token"])
def test_on_policy_a_normalised_ratio_divides_by_the_length_once(logits, name, ratio):
    """Each token of a completion holds the mean of its log-ratios; summed over its tokens, the division is undone.

    cispo takes the ratio as a weight only, so that there its kind does not matter.
    """
    loss = loss_of(logits, objective=name, settings={**ON_THE_POLICY[name], "ratio": ratio})
    assert_same(expected_gradient(loss, logits, POLICY), -gradient_of_expected(reward))


def test_unclipped_off_policy_cispo_is_exact_by_sequence(logits):
    """Its weight has no gradient and log pi of each token has: with the full ratio that is the policy gradient."""
    settings = {"ratio": "sequence", "clip_low": 1.0, "clip_high": 1e6}
    loss = loss_of(logits, objective="cispo", settings=settings, sampler=SAMPLER)
    assert_same(expected_gradient(loss, logits, SAMPLER), -gradient_of_expected(reward))


def test_unclipped_off_policy_cispo_is_the_token_ratio_s(logits):
    plain = loss_of(logits, objective="policy_gradient", settings={"ratio": "token"}, sampler=SAMPLER)
    settings = {"ratio": "token", "clip_low": 1.0, "clip_high": 1e6}
    cispo = loss_of(logits, objective="cispo", settings=settings, sampler=SAMPLER)
    assert_same(expected_gradient(cispo, logits, SAMPLER), expected_gradient(plain, logits, SAMPLER))


@pytest.mark.parametrize("aggregation", ["sequence_sum", "sequence_mean"])
def test_on_the_policy_gmpo_divides_by_the_length(logits, aggregation):
    """A geometric mean of n ratios moves by 1/n with each: the mean over tokens keeps the 1/n, their sum undoes it."""
    settings = {"clip_low": 0.4, "clip_high": 0.4}
    loss = loss_of(logits, objective="gmpo", settings=settings, aggregation=aggregation)
    exponent = 1 if aggregation == "sequence_mean" else 0
    assert_same(
        expected_gradient(loss, logits, POLICY), -gradient_of_expected(lambda c: reward(c) / len(c) ** exponent)
    )


def test_off_the_policy_the_clip_leaves_out_what_a_bound_stops(logits):
    """Every token by hand: its ratio times grad log pi, but none where the ratio left the range on the side of A."""
    loss = loss_of(logits, objective="clip", settings=CLIP, sampler=SAMPLER)
    wanted, num_stopped = torch.zeros_like(logits), 0
    for completion in COMPLETIONS[LIMIT]:
        earned = reward(completion)
        ratios = (logprobs(POLICY, completion) - logprobs(SAMPLER, completion)).exp()
        stopped = ratios > 1 + CLIP["clip_high"] if earned > 0 else ratios < 1 - CLIP["clip_low"]
        num_stopped += int(stopped.sum())
        kept = torch.where(stopped, 0.0, ratios)
        slope = gradient((kept * logprobs(logits, completion)).sum(), logits)
        wanted -= chance(SAMPLER, completion) * earned * slope
    assert 0 < num_stopped < sum(map(len, COMPLETIONS[LIMIT]))
    assert_same(expected_gradient(loss, logits, SAMPLER), wanted)


# The KL to the reference

BETA = 0.3


def log_ratio_to_reference(completion: Completion) -> float:
    return (logprobs(POLICY, completion) - logprobs(REFERENCE, completion)).sum().item()


def sequence_kl(logits: Tensor) -> Tensor:
    """KL(policy || reference) over whole completions, from its definition."""

    def difference(completion: Completion) -> Tensor:
        return (logprobs(logits, completion) - logprobs(REFERENCE, completion)).sum()

    return expectation(logits, difference)


def visits(policy: Tensor) -> Tensor:
    """How probable each prefix is: [S]."""
    return torch.stack([logprobs(policy, prefix).sum().exp() for prefix in PREFIXES])


def test_the_kl_of_completions_sums_that_of_prefixes_by_visits(logits):
    at_prefixes = (visits(logits) * exact_kl(logits, REFERENCE)).sum()
    assert at_prefixes.item() == pytest.approx(sequence_kl(logits).item(), abs=1e-12)
    assert_same(gradient(at_prefixes, logits), gradient(sequence_kl(logits), logits))


@pytest.mark.parametrize(("size", "baseline"), [(1, "none"), (2, "leave_one_out")])
def test_k1_in_the_reward_is_the_kl_over_completions(logits, size, baseline):
    """The reward less beta times the summed log-ratio: the policy gradient is that of E[r] - beta KL(pi || ref)."""

    def rewarded(completion: Completion) -> float:
        penalty = kl_penalty(logprobs(POLICY, completion), logprobs(REFERENCE, completion), estimator="k1")
        return reward(completion) - BETA * penalty.sum().item()

    loss = loss_of(
        logits,
        objective="policy_gradient",
        settings={"ratio": "token"},
        advantages=within_group(baseline=baseline, scale="none"),
        rewarded=rewarded,
    )
    got = expected_gradient(loss, logits, POLICY, size=size)
    assert_same(got, -gradient(expectation(logits, reward) - BETA * sequence_kl(logits), logits))
    assert (got + gradient_of_expected(reward)).abs().max() > 1e-2  # the KL is felt


def test_k3_in_the_reward_is_not_the_kl(logits):
    """Its value is right; as a reward it lacks its own slope, which at a prefix is that of KL(ref || pi)."""

    def rewarded(completion: Completion) -> float:
        penalty = kl_penalty(logprobs(POLICY, completion), logprobs(REFERENCE, completion), estimator="k3")
        return -penalty.sum().item()

    loss = loss_of(logits, objective="policy_gradient", settings={"ratio": "token"}, rewarded=rewarded)
    got = expected_gradient(loss, logits, POLICY)
    reverse = (visits(POLICY) * exact_kl(REFERENCE, logits)).sum()
    assert_same(got, gradient(sequence_kl(logits) - reverse, logits))
    assert (got - gradient(sequence_kl(logits), logits)).abs().max() > 1e-2


def kl_gradients(logits: Tensor, sampler: Tensor, *, estimator: str, corrected: bool) -> Tensor:
    """The expected gradient of the summed penalty over every completion of the sampler: [S, V]."""

    def loss(group: Group) -> Tensor:
        terms = terms_of(logits, sampler, group, [0.0], [0.0])
        old = terms.old_logprobs if corrected else None
        penalty = kl_penalty(terms.policy_logprobs, terms.reference_logprobs, estimator=estimator, old_logprobs=old)
        return aggregated(penalty, group, "sequence_sum")

    return expected_gradient(loss, logits, sampler)


SAMPLERS = {"on the policy": POLICY, "off the policy": SAMPLER}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_in_the_loss_the_gradient_is_the_kl_s_at_each_prefix(logits, estimator, sampler):
    """A prefix weighs as much as the sampler visits it.

    k2's weight has no gradient, and so it is right off the policy too.
    """
    got = kl_gradients(logits, sampler, estimator=estimator, corrected=True)
    assert_same(got, gradient((visits(sampler) * exact_kl(logits, REFERENCE)).sum(), logits))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
def test_at_a_single_prefix_the_gradient_is_that_of_the_exact_kl(prefix, estimator, sampler):
    policy = POLICY[STATE[prefix]].clone().requires_grad_()
    old, reference = (x[STATE[prefix]].log_softmax(0) for x in (sampler, REFERENCE))
    penalty = kl_penalty(policy.log_softmax(0), reference, estimator=estimator, old_logprobs=old)
    exact = exact_kl(policy, REFERENCE[STATE[prefix]])
    if estimator != "k2":
        assert (old.exp() * penalty).sum().item() == pytest.approx(exact.item(), abs=EXACT)
    assert_same(gradient((old.exp() * penalty).sum(), policy), gradient(exact, policy))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_in_expectation_k1_and_k3_are_the_kl_and_k2_is_not(logits, estimator):
    got = expectation(
        logits,
        lambda c: kl_penalty(logprobs(POLICY, c), logprobs(REFERENCE, c), estimator=estimator).sum(),
    ).item()
    if estimator == "k2":
        assert abs(got - sequence_kl(logits).item()) > 1e-2
    else:
        assert got == pytest.approx(sequence_kl(logits).item(), abs=EXACT)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_without_sampler_probabilities_the_gradient_differs(logits, estimator):
    """On the policy k1 has none; k3 has that of KL(ref || pi) at each prefix; k2 alone has that of KL(pi || ref)."""
    got = kl_gradients(logits, POLICY, estimator=estimator, corrected=False)
    right = gradient((visits(POLICY) * exact_kl(logits, REFERENCE)).sum(), logits)
    if estimator == "k1":
        assert got.abs().max() < EXACT
    elif estimator == "k2":
        assert_same(got, right)
    else:
        assert_same(got, gradient((visits(POLICY) * exact_kl(REFERENCE, logits)).sum(), logits))
        assert angle_between(got, right) > 0.1


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_off_policy_without_weights_the_gradient_is_not_the_kl_s(logits, estimator):
    got = kl_gradients(logits, SAMPLER, estimator=estimator, corrected=False)
    right = gradient((visits(SAMPLER) * exact_kl(logits, REFERENCE)).sum(), logits)
    assert angle_between(got, right) > 0.1


def test_in_the_loss_prefix_kl_is_not_the_kl_over_completions(logits):
    """It does not feel that a token leads to prefixes that are far from the reference; in the reward it does."""
    got = kl_gradients(logits, POLICY, estimator="k1", corrected=True)
    whole = gradient(sequence_kl(logits), logits)
    assert (got - whole).abs().max() > 1e-2
    last = [STATE[prefix] for prefix in PREFIXES if len(prefix) == LIMIT - 1]  # nothing comes after these
    torch.testing.assert_close(got[last], whole[last], atol=EXACT, rtol=0)


# What is biased, and how


def score_gradient(completion: Completion) -> Tensor:
    """grad log pi(completion): [S, V]."""
    logits = POLICY.clone().requires_grad_()
    return gradient(logprobs(logits, completion).sum(), logits)


SCORES = {completion: score_gradient(completion) for limit in COMPLETIONS for completion in COMPLETIONS[limit]}


def hand_expected(of_group: Callable[[Group], list[float]], size: int, limit: int = LIMIT) -> Tensor:
    """-E[mean over the group of weight * grad log pi], the weights of a group's completions being given: [S, V]."""
    total = torch.zeros_like(POLICY)
    for group in itertools.product(COMPLETIONS[limit], repeat=size):
        weights = of_group(group)
        probability = math.prod(chance(POLICY, c).item() for c in group)
        for completion, weight in zip(group, weights, strict=True):
            total -= probability * weight / size * SCORES[completion]
    return total


def differences(group: Group) -> list[float]:
    rewards = [reward(c) for c in group]
    return [r - statistics.fmean(rewards) for r in rewards]


@pytest.mark.parametrize(("size", "limit"), GROUPS)
@pytest.mark.parametrize(("scale", "std"), [("sample", statistics.stdev), ("population", statistics.pstdev)])
def test_the_std_divides_each_group_and_turns_the_whole_gradient(logits, scale, std, size, limit):
    """A group counts as much as it agrees: the expected gradient is E[group's gradient / (std + epsilon)].

    It is no longer along the gradient of the expected reward.
    """

    def scaled(group: Group) -> list[float]:
        divisor = std([reward(c) for c in group]) + 1e-6
        return [difference / divisor for difference in differences(group)]

    loss = loss_of(
        logits,
        objective="policy_gradient",
        settings={"ratio": "token"},
        advantages=within_group(baseline="group", scale=scale),
    )
    got = expected_gradient(loss, logits, POLICY, size=size, limit=limit)
    assert_same(got, hand_expected(scaled, size, limit))
    assert angle_between(got, hand_expected(differences, size, limit)) > 0.01
    assert angle_between(hand_expected(differences, size, limit), -gradient_of_expected(reward, limit)) < 1e-6


def test_in_a_pair_the_std_leaves_only_who_won(logits):
    """+-1/sqrt(2) by the sample std, however close: any increasing function of the rewards has the same gradient."""
    gradients = []
    for rewarded in (reward, lambda c: math.exp(3 * reward(c))):
        loss = loss_of(
            logits,
            objective="policy_gradient",
            settings={"ratio": "token"},
            advantages=lambda rewards: group_advantages(torch.tensor([rewards]).double(), epsilon=0.0)[0],
            rewarded=rewarded,
        )
        gradients.append(expected_gradient(loss, logits, POLICY, size=2))
    assert_same(*gradients)


@pytest.mark.parametrize("size", [1, 2])
def test_the_mean_of_each_completion_optimises_reward_per_token(logits, size):
    """Each term is divided by its length, as though it had earned r / length: a long wrong completion costs less."""
    loss = loss_of(logits, objective="policy_gradient", settings={"ratio": "token"}, aggregation="sequence_mean")
    got = expected_gradient(loss, logits, POLICY, size=size)
    assert_same(got, -gradient_of_expected(lambda c: reward(c) / len(c)))
    assert angle_between(got, -gradient_of_expected(reward)) > 0.01


def test_the_fixed_length_divides_every_completion_alike(logits):
    """The gradient of the expected reward, over the length limit."""
    loss = loss_of(logits, objective="policy_gradient", settings={"ratio": "token"}, aggregation="fixed_length")
    assert_same(expected_gradient(loss, logits, POLICY), -gradient_of_expected(reward) / LIMIT)


def test_the_mean_over_all_tokens_divides_a_group_by_its_tokens(logits):
    """The number of tokens is drawn with the group, so that groups of short completions weigh more."""

    def per_token(group: Group) -> list[float]:
        rewards = [reward(c) for c in group]
        num_tokens = sum(map(len, group))
        others = [sum(rewards) - r for r in rewards]  # in a pair the mean of the others is the other one
        return [(r - other) * len(group) / num_tokens for r, other in zip(rewards, others, strict=True)]

    loss = loss_of(
        logits,
        objective="policy_gradient",
        settings={"ratio": "token"},
        aggregation="token_mean",
        advantages=within_group(baseline="leave_one_out", scale="none"),
    )
    got = expected_gradient(loss, logits, POLICY, size=2)
    assert_same(got, hand_expected(per_token, 2))
    assert angle_between(got, -gradient_of_expected(reward)) > 0.01


# The anchored objective


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def anchored_slope(policy: float, reference: float, *, weight: float, alpha: float, beta: float) -> float:
    """The closed form, from probabilities: what multiplies grad log pi."""
    mixture = alpha * math.exp(policy) + (1 - alpha) * math.exp(reference)
    z = policy - math.log(mixture)
    return -weight * beta * sigmoid(-beta * z) * (1 - alpha) * math.exp(reference) / mixture


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("aggregation", ["sequence_sum", "sequence_mean"])
def test_per_sequence_the_gradient_is_its_closed_form(logits, alpha, beta, aggregation):
    """As written: a mixture of the probabilities of whole completions. The loss stands at each token, so its mean is the loss."""
    settings = {"anchor_alpha": alpha, "anchor_beta": beta, "anchor_level": "sequence", "anchor_weight": "reward"}
    loss = loss_of(logits, objective="anchored", settings=settings, aggregation=aggregation)
    wanted = torch.zeros_like(logits)
    for completion in COMPLETIONS[LIMIT]:
        policy, reference = (logprobs(x, completion).sum().item() for x in (POLICY, REFERENCE))
        slope = anchored_slope(policy, reference, weight=reward(completion), alpha=alpha, beta=beta)
        times = len(completion) if aggregation == "sequence_sum" else 1
        wanted += chance(POLICY, completion) * slope * times * SCORES[completion]
    torch.testing.assert_close(expected_gradient(loss, logits, POLICY), wanted, atol=EXACT, rtol=0)
    assert wanted.abs().max() > 1e-5


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.99])
def test_per_token_the_gradient_is_its_closed_form(logits, alpha, beta):
    settings = {"anchor_alpha": alpha, "anchor_beta": beta, "anchor_level": "token", "anchor_weight": "reward"}
    loss = loss_of(logits, objective="anchored", settings=settings)
    wanted = torch.zeros_like(logits)
    for completion in COMPLETIONS[LIMIT]:
        policy, reference = (logprobs(x, completion).tolist() for x in (POLICY, REFERENCE))
        slopes = [
            anchored_slope(p, r, weight=reward(completion), alpha=alpha, beta=beta)
            for p, r in zip(policy, reference, strict=True)
        ]
        moved = (torch.tensor(slopes, dtype=torch.float64) * logprobs(logits, completion)).sum()
        wanted += chance(POLICY, completion) * gradient(moved, logits)
    torch.testing.assert_close(expected_gradient(loss, logits, POLICY), wanted, atol=EXACT, rtol=0)
    assert wanted.abs().max() > 1e-5


def test_the_weight_is_the_reward_or_the_advantage(logits):
    """With the advantage each completion of a pair weighs what it is better than the other."""
    settings = {"anchor_alpha": 0.5, "anchor_beta": 1.0, "anchor_level": "sequence"}
    group = (COMPLETIONS[LIMIT][3], COMPLETIONS[LIMIT][9])

    def weighted_by(weight: str, **arguments) -> Tensor:
        chosen = {**settings, "anchor_weight": weight}
        return gradient(loss_of(logits, objective="anchored", settings=chosen, **arguments)(group), logits)

    centred = within_group(baseline="group", scale="none")
    mean = statistics.fmean(reward(c) for c in group)
    assert_same(
        weighted_by("advantage", advantages=centred),
        weighted_by("reward", rewarded=lambda completion: reward(completion) - mean),
    )
    assert_same(weighted_by("reward", advantages=centred), weighted_by("reward"))
    assert (weighted_by("advantage", advantages=centred) - weighted_by("reward")).abs().max() > 1e-2


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_at_a_fresh_reference_it_is_the_policy_gradient(logits, level, alpha):
    """There z is 0, and what is left is beta / 2 * (1 - alpha) times the gradient of the expected reward."""
    beta = 1.7

    def loss(group: Group) -> Tensor:
        terms = terms_of(logits, POLICY, group, [0.0], [reward(group[0])])
        terms = TokenTerms(**{**vars(terms), "reference_logprobs": terms.policy_logprobs.detach()})
        per_token = OBJECTIVES["anchored"].loss(
            terms, anchor_alpha=alpha, anchor_beta=beta, anchor_level=level, anchor_weight="reward"
        )
        return aggregated(per_token, group, "sequence_sum" if level == "token" else "sequence_mean")

    assert_same(expected_gradient(loss, logits, POLICY), -gradient_of_expected(reward) * beta / 2 * (1 - alpha))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.9])
def test_the_anchor_of_whole_completions_is_a_distribution(alpha):
    """The mixture of two distributions over completions sums to one; each is between the two it is made from."""
    policy, reference = (torch.stack([logprobs(x, c).sum() for c in COMPLETIONS[LIMIT]]) for x in (POLICY, REFERENCE))
    anchor = anchor_logprobs(policy, reference, alpha=alpha)
    assert anchor.exp().sum().item() == pytest.approx(1, abs=1e-14)
    for mixed, p, r in zip(anchor.tolist(), policy.tolist(), reference.tolist(), strict=True):
        assert mixed == pytest.approx(math.log(alpha * math.exp(p) + (1 - alpha) * math.exp(r)), abs=1e-12)
        assert min(p, r) - 1e-12 <= mixed <= max(p, r) + 1e-12


def test_an_alpha_of_zero_compares_with_the_reference_itself():
    policy, reference = POLICY.log_softmax(1).flatten(), REFERENCE.log_softmax(1).flatten()
    assert torch.equal(anchor_logprobs(policy, reference, alpha=0.0), reference)
    got = anchored_loss(policy, reference, torch.full_like(policy, 2.0), alpha=0.0, beta=0.7).tolist()
    for loss, p, r in zip(got, policy.tolist(), reference.tolist(), strict=True):
        assert loss == pytest.approx(-2 * math.log(sigmoid(0.7 * (p - r))), rel=1e-12)


@pytest.mark.parametrize("alpha", [-0.1, -1e-9, 1.0, 1.5, math.nan])
def test_an_alpha_outside_its_range_is_refused(alpha):
    """At 1 the anchor is the policy, and the gradient zero everywhere."""
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="alpha"):
        anchored_loss(one, one, one, alpha=alpha, beta=1.0)
    with pytest.raises(ValueError, match="alpha"):
        anchor_logprobs(one, one, alpha=alpha)


@given(
    policy=st.floats(-1e4, 0),
    reference=st.floats(-1e4, 0),
    alpha=st.floats(1e-6, 0.999999),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=200, deadline=None)
def test_the_log_ratio_never_exceeds_minus_log_alpha(policy, reference, alpha, dtype):
    """However unlikely the reference finds it: the anchor holds a share alpha of the policy.

    Rounding is allowed for.
    """
    policy, reference = torch.tensor([policy], dtype=dtype), torch.tensor([reference], dtype=dtype)
    log_ratio = (policy - anchor_logprobs(policy, reference, alpha=alpha)).item()
    rounding = 4 * torch.finfo(dtype).eps * (1 + abs(policy.item()))
    assert log_ratio <= -math.log(alpha) + rounding
    if policy < reference:
        assert log_ratio <= rounding  # and what the reference likes better has none


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_a_token_the_reference_excludes_reaches_the_bound(alpha):
    policy, reference = torch.tensor([-1.0]).double(), torch.tensor([-1e4]).double()
    log_ratio = policy - anchor_logprobs(policy, reference, alpha=alpha)
    assert log_ratio.item() == pytest.approx(-math.log(alpha), abs=1e-12)
