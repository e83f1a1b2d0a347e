"""Value and reward models read the same stream as the policy."""

import warnings

import pytest
import torch

from coterie.fast.serve import Policy
from coterie.models.heads import Scorer
from coterie.rollouts.pack import Row, make_stream

GROUPS = [([3, 4, 5], [[6, 7], [8, 9, 10, 11], [12]]), ([13], [[14, 15, 16]]), ([17, 18, 19, 20], [[21], [22, 23]])]


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama", "gpt2", "mistral", "doge"])
def test_scores_and_values_are_those_of_each_row_alone(make_model, architecture):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = Policy.of(make_model(architecture))
    assert (policy.served == "padded") == (architecture == "doge")
    scorer = Scorer.from_policy(policy)
    torch.manual_seed(3)
    torch.nn.init.normal_(scorer.model.score.weight)
    stream = make_stream([(prompt, [Row.written(c) for c in completions]) for prompt, completions in GROUPS])
    scores, values = scorer.scores(stream), scorer.values(stream)
    expected_scores, expected_values = [], []
    for prompt, completions in GROUPS:
        for completion in completions:
            states = scorer.model.base_model(torch.tensor([prompt + completion])).last_hidden_state[0]
            of_tokens = (states @ scorer.model.score.weight.T).squeeze(1)
            expected_scores.append(of_tokens[-1])
            expected_values.append(of_tokens[len(prompt) - 1 : -1])
    torch.testing.assert_close(scores, torch.stack(expected_scores), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, torch.cat(expected_values), rtol=1e-5, atol=1e-5)


def test_a_scorer_starts_from_the_policy_s_body_and_scores_zero(make_model):
    policy = Policy.of(make_model("qwen3"))
    state = torch.random.get_rng_state()
    scorer = Scorer.from_policy(policy)
    assert torch.equal(state, torch.random.get_rng_state())
    for ours, theirs in zip(scorer.model.base_model.parameters(), policy.model.base_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours is not theirs
    assert (scorer.scores(make_stream([([3], [Row.written([4, 5])])])) == 0).all()
