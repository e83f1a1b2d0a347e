"""The packed stream with shared prompts gives what the plain model gives, run on each row by itself."""

import pytest
import torch
from conftest import SHAPES
from small_streams import DEVICE, plain_logprobs, stream_of

from coterie.fast import tiles
from coterie.fast.serve import Policy
from coterie.models.logprobs import head_statistics, token_logprobs

pytestmark = pytest.mark.usefixtures("each_way")
SERVED = [name for name in SHAPES if name != "doge"]


def random_groups(seed=0, vocabulary=61):
    """Prompts and completions of very different lengths, a group of one among them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    shapes = [(5, (4, 17, 1)), (11, (2, 3)), (3, (9,)), (1, (6, 30, 8, 2)), (23, (5, 5))]
    return [(draw(p), [draw(c) for c in cs]) for p, cs in shapes]


@pytest.mark.parametrize("architecture", SERVED)
def test_logprobs_loss_and_every_gradient_equal_the_plain_run(make_model, architecture):
    model, groups = make_model(architecture), random_groups()
    policy = Policy.of(model)
    assert policy.served == "stream"
    weights = torch.randn(stream_of(groups).targets.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)

    plain = plain_logprobs(model, groups, temperature=0.8)
    (plain * weights).mean().backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    packed = token_logprobs(policy, stream_of(groups), temperature=0.8)
    (packed * weights).mean().backward()

    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_that_cannot_be_served_is_named_and_run_padded(make_model):
    model, groups = make_model("doge"), random_groups()
    with pytest.warns(UserWarning, match=type(model).__name__):
        policy = Policy.of(model)
    assert policy.served == "padded"
    with torch.no_grad():
        packed = token_logprobs(policy, stream_of(groups))
        torch.testing.assert_close(packed, plain_logprobs(model, groups), rtol=0, atol=1e-5)


def test_a_window_that_is_ignored_would_be_noticed(make_model):
    """The windows of the shapes above are narrower than the rows: without them the log-probabilities differ widely."""
    groups = random_groups()
    windowed, wide = make_model("mistral"), make_model("mistral", sliding_window=None)
    wide.load_state_dict(windowed.state_dict())
    with torch.no_grad():
        assert (plain_logprobs(windowed, groups) - plain_logprobs(wide, groups)).abs().max() > 0.05


def test_a_completion_does_not_see_its_siblings(make_model):
    policy, groups = Policy.of(make_model("qwen3")), random_groups()
    prompt, completions = groups[0]
    changed = [(prompt, [completions[0], [7] * 17, completions[2]]), *groups[1:]]
    with torch.no_grad():
        before, after = (token_logprobs(policy, stream_of(g)) for g in (groups, changed))
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[21:], after[21:])
    assert not torch.equal(before[4:21], after[4:21])


def test_the_model_is_its_plain_self_afterwards(make_model):
    model = make_model("llama")
    tokens = torch.randint(61, (2, 9)).to(DEVICE)
    before = model(tokens).logits
    token_logprobs(Policy.of(model), stream_of(random_groups()))
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_and_gradients_equal_whole_ones(make_model, monkeypatch, temperature):
    policy = Policy.of(make_model("gemma2"))
    hidden = torch.randn(37, 32).to(DEVICE).requires_grad_()
    targets = torch.randint(61, (37,)).to(DEVICE)
    support = [torch.cat([target[None], torch.randperm(61)[:9]]).unique() for target in targets.cpu()]
    results = []
    for chunk_logits in (10**9, 61 * 5):
        hidden.grad = None
        monkeypatch.setattr("coterie.models.logprobs.CHUNK_LOGITS", chunk_logits)
        found = head_statistics(policy, hidden, targets, support, temperature=temperature).logprobs
        found.sin().sum().backward()
        results.append((found.detach(), hidden.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "phi"])  # phi's head has a bias, gpt2's is the embedding
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "tile", [(70, 14), (1 << 20, 2048)]
)  # five tokens by fourteen of the vocabulary, and all in one
def test_a_plain_head_s_gradients_in_tiles_are_whole_logits_ones(
    make_model, monkeypatch, architecture, temperature, tile
):
    monkeypatch.setitem(tiles.TILE_LOGITS, torch.device(DEVICE).type, tile)
    policy = Policy.of(make_model(architecture))
    head = tiles.plain_head(policy)
    assert head is not None
    policy.model.double()
    hidden = torch.randn(37, 32, dtype=torch.float64).to(DEVICE).requires_grad_()
    targets = torch.randint(61, (37,)).to(DEVICE)
    inputs = [hidden, *head.parameters()]
    found = head_statistics(policy, hidden, targets, temperature=temperature).logprobs
    whole = (head(hidden) / temperature).log_softmax(1)[torch.arange(37), targets]
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(found.sin().sum(), inputs), torch.autograd.grad(whole.sin().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("architecture", ["gemma2", "granite"])
def test_a_head_with_something_after_it_is_not_plain(make_model, architecture):
    assert tiles.plain_head(Policy.of(make_model(architecture))) is None


def test_truncated_logprobs_are_those_of_the_kept_tokens(make_model):
    policy = Policy.of(make_model("qwen3"))
    hidden, targets = torch.randn(3, 32).to(DEVICE), torch.tensor([4, 9, 60]).to(DEVICE)
    support = [torch.tensor([4]), torch.tensor([1, 9]), torch.arange(61)]
    with torch.no_grad():
        got = head_statistics(policy, hidden, targets, support).logprobs
        logits = policy.logits(hidden)
    assert got[0] == 0
    torch.testing.assert_close(got[1], logits[1, 9] - logits[1, [1, 9]].logsumexp(0))
    torch.testing.assert_close(got[2], logits[2].log_softmax(0)[60])
