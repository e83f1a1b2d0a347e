"""A sampler that is not the trainer's model ends the run; rounding, in bfloat16 too, does not."""

import sqlite3

import pytest
import torch

import coterie
from coterie.errors import RunFailedError
from coterie.fast.native import NativeEngine
from coterie.fast.serve import Policy
from coterie.models.logprobs import logprobs_of
from coterie.noise import key, mix
from coterie.recipe.settings import Lora, Sampling
from coterie.rollouts.pack import Row, make_stream
from coterie.training.gap import rounding_at_the_gap


def samples_of(policy, **sampling):
    keys = mix(torch.tensor(key("gap")), torch.arange(48)).view(6, 8)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(61, (9 + 3 * p,), generator=generator).tolist() for p in range(6)]
    groups = NativeEngine(policy).generate(prompts, keys, Sampling(max_new_tokens=24, **sampling), [])
    return [
        make_stream([(prompt, [Row(c.tokens, c.logprobs, support=c.support) for c in group])])
        for prompt, group in zip(prompts, groups, strict=True)
    ]


def gaps_of(policy, streams, temperature=1.0):
    found = logprobs_of(policy, streams, temperature=temperature)
    return [(ours - stream.sampler_logprobs).abs() for ours, stream in zip(found, streams, strict=True)]


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_in_float32_there_is_nothing_to_explain(make_model, architecture):
    policy = Policy.of(make_model(architecture))
    streams = samples_of(policy)
    assert rounding_at_the_gap(policy, streams, gaps_of(policy, streams), temperature=1.0) == {}


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("times", [1, 4])
def test_in_bfloat16_rounding_explains_what_there_is(make_model, architecture, times):
    """Also where large weights make it a nat and more."""
    model = make_model(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(times)
    policy = Policy.of(model.bfloat16())
    streams = samples_of(policy, top_k=7)
    gaps = gaps_of(policy, streams)
    explained = rounding_at_the_gap(policy, streams, gaps, temperature=1.0)
    assert max(gap.max().item() for gap in gaps) <= explained.get("policy/sampler_rounding", 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_was_sampled_otherwise_is_not_explained(make_model, dtype):
    """Sampler's figures of a model whose first tokens are hidden from what follows: what a lost memory gives."""
    policy = Policy.of(make_model("qwen3").to(dtype)).with_adapter(Lora(rank=2), seed=0)
    streams = samples_of(policy)
    gaps = gaps_of(policy, streams)
    gaps[3][50] = 1.0
    explained = rounding_at_the_gap(policy, streams, gaps, temperature=1.0)
    assert explained["policy/sampler_rounding"] < 1.0


def events(folder):
    with sqlite3.connect(folder / "run.db") as db:
        return db.execute("SELECT step, message FROM events WHERE kind = 'limit'").fetchall()


@pytest.fixture
def forgetful(monkeypatch):
    """An engine that goes wrong once training is under way: it reads the first token of a prompt alone."""
    sound = NativeEngine.generate

    def wrong(self, prompts, keys, *arguments, **keywords):
        in_training = keys.shape == (3, 4)  # prompts and completions of a step
        return sound(self, [p[:1] for p in prompts] if in_training else prompts, keys, *arguments, **keywords)

    monkeypatch.setattr(NativeEngine, "generate", wrong)


@pytest.mark.parametrize("preset", ["grpo", "ppo"])
def test_a_sampler_of_another_model_ends_the_run_with_advice(tiny_recipe, tmp_path, forgetful, preset):
    given = [*tiny_recipe, f"preset={preset}", "evaluation={prompts: 2, samples: 1}"]
    given += ["loss.kl_weight=0.04"]  # so that completions without an advantage are learned from too
    with pytest.raises(
        RunFailedError, match=r"step 1: .* rounding explains 0.01: .*COTERIE_KERNELS=off.*limits.stop_on"
    ):
        coterie.train("equations", overrides=given, out=str(tmp_path / "ends"))
    ((step, _),) = events(tmp_path / "ends")
    assert step == 1


def test_with_a_correction_it_is_an_event_and_the_run_goes_on(tiny_recipe, tmp_path, forgetful):
    given = [*tiny_recipe, "evaluation={prompts: 2, samples: 1}", "steps=2", "correction.kind=truncate"]
    run = coterie.train("equations", overrides=[*given, "loss.kl_weight=0.04"], out=str(tmp_path / "run"))
    assert len(events(run.folder)) == 1
