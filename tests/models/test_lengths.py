"""Where positions depend on how long a sequence is, every row gets its own, and none is sampled whose positions could change."""

import pytest
import torch
from conftest import SMALL
from small_streams import stream_of
from transformers import AutoConfig, AutoModelForCausalLM

from coterie.errors import UserError
from coterie.fast.decoder import Decoder
from coterie.fast.native import NativeEngine
from coterie.fast.serve import Policy
from coterie.models.lengths import Lengths
from coterie.models.logprobs import token_logprobs
from coterie.recipe.settings import Sampling
from coterie.rollouts.padded import PaddedEngine

LIMIT = 32
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [3.0, 6.0, 9.0, 12.0],
    "original_max_position_embeddings": LIMIT,
}
MODELS = {
    "phi3": {**SMALL, "pad_token_id": 0, "rope_parameters": LONGROPE, "original_max_position_embeddings": LIMIT},
    "phimoe": {
        **SMALL,
        "num_local_experts": 2,
        "rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
    },
    "llama": {**SMALL, "rope_parameters": LONGROPE},
    "qwen3": {
        **SMALL,
        "head_dim": 8,
        "max_position_embeddings": LIMIT,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    },
}
KINDS = pytest.mark.parametrize("architecture", MODELS)


def make(architecture):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **MODELS[architecture]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def policies(model):
    served = Policy.of(model)
    assert served.served == "stream"
    return served, Policy(model, "padded", lengths=served.lengths)


def groups_of(lengths):
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: torch.randint(61, (n,), generator=generator).tolist()  # noqa: E731
    return [(draw(prompt), [draw(n) for n in completions]) for prompt, completions in lengths]


def alone(architecture, groups):
    """Each row through a model that has met no other: [N], and the gradients of the sum of their sines."""
    found, gradients = [], {}
    for prompt, completions in groups:
        for completion in completions:
            model = make(architecture)
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
            logprobs = logits.log_softmax(1)[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]
            logprobs.sin().sum().backward()
            found.append(logprobs.detach())
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradients[name] = gradients.get(name, 0) + parameter.grad
    return torch.cat(found), gradients


@KINDS
def test_each_row_gets_the_positions_that_it_has_alone(architecture):
    """Rows of 14 to 64 tokens around a limit of 32, longer and shorter ones of one group among them."""
    groups = groups_of([(9, (5, 23, 24, 55)), (4, (20,)), (40, (3, 6, 24)), (30, (1, 2, 3))])
    expected, gradients = alone(architecture, groups)
    model = make(architecture)
    for policy in policies(model):
        model.zero_grad()
        found = token_logprobs(policy, stream_of(groups))
        found.sin().sum().backward()
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-5)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                error = (parameter.grad - gradients[name]).abs().max()
                assert error <= 2e-5 * gradients[name].abs().max().clamp(min=1e-2), (policy.served, name, error)


@KINDS
def test_the_model_forgets_the_longest_sequence_that_it_met(architecture):
    model, tokens = make(architecture), torch.arange(20)[None]
    before = model(input_ids=tokens).logits
    with torch.no_grad():
        token_logprobs(Policy.of(model), stream_of(groups_of([(9, (55,))])))
    assert torch.equal(model(input_ids=tokens).logits, before)


@KINDS
def test_on_both_sides_of_the_limit_prompts_keep_their_positions(architecture):
    lengths = [5, 40, 20, 33] if architecture != "qwen3" else [5, 20]
    prompts = [prompt for prompt, _ in groups_of([(n, ()) for n in lengths])]
    keys, sampling = torch.arange(2 * len(prompts)).view(-1, 2), Sampling(max_new_tokens=12)
    for policy in policies(make(architecture)):
        engine = (NativeEngine if policy.served == "stream" else PaddedEngine)(policy)
        made = engine.generate(prompts, keys, sampling, [])
        groups = [(p, [one.tokens for one in of]) for p, of in zip(prompts, made, strict=True)]
        recorded = torch.cat([one.logprobs for of in made for one in of])
        torch.testing.assert_close(recorded, alone(architecture, groups)[0], rtol=0, atol=1e-5)


@KINDS
@pytest.mark.parametrize("engine", [NativeEngine, PaddedEngine])
def test_a_sequence_that_could_cross_the_limit_is_refused(architecture, engine):
    policy = policies(make(architecture))[engine is PaddedEngine]
    with pytest.raises(UserError, match="prompt of 20 tokens and max_new_tokens=13 make 33, and above 32"):
        engine(policy).generate([[1] * 20], torch.zeros(1, 1, dtype=torch.long), Sampling(max_new_tokens=13), [])


def test_ordinary_positions_keep_all_rows_together(make_model):
    lengths = Lengths.of(make_model("llama"))
    lengths.check(100, 1000)
    assert lengths.alike([5, 100, 1000]) == [[0, 1, 2]]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_compiled_loops_refuse_angles_that_depend_on_the_length(architecture):
    """They turn every row by the angles of the longest sequence that there is room for."""
    served, _ = policies(make(architecture))
    assert served.body is not None
    assert Decoder.of(served, 2 * LIMIT) is None
