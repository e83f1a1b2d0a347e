"""What the padded engine samples has the log-probabilities of the plain model, whatever the model remembers by."""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from coterie.errors import UserError
from coterie.fast.serve import Policy
from coterie.noise import key, mix
from coterie.recipe.settings import Lora, Sampling
from coterie.rollouts.padded import PaddedEngine

TINY = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None}  # fmt: skip
ATTENTION = {**TINY, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
             "max_position_embeddings": 128}  # fmt: skip
REMEMBERS = {
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "mamba": {**TINY, "state_size": 8},
    "mamba2": {**TINY, "state_size": 8, "expand": 2, "head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": {**TINY, "state_size": 8},
    "jamba": {**ATTENTION, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 8,
              "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "lfm2": {**ATTENTION, "layer_types": ["conv", "full_attention"]},
    "diffllama": ATTENTION,  # its layers attend twice
    "dory": {**ATTENTION, "head_dim": 8, "num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1,
             "n_recurrent_layers": 2, "sliding_window": 9},
    "hrm_text": ATTENTION,
}  # fmt: skip
FORGETS = {
    "openai-gpt": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "recurrent_gemma": {**ATTENTION, "num_hidden_layers": 3, "head_dim": 8, "lru_width": 32},
    "rwkv": {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    "roberta": {**TINY, "num_attention_heads": 4, "intermediate_size": 48, "pad_token_id": 3, "is_decoder": True},
}


def make(architecture, settings, **more):
    if architecture not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {architecture}")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def largest_gap(policy):
    """Between what the engine says of each token and the model's plain pass of the row alone, in nats."""
    keys = mix(torch.tensor(key("padded")), torch.arange(6)).view(2, 3)
    prompts = [[7, 8, 9, 3], torch.randint(61, (23,), generator=torch.Generator().manual_seed(0)).tolist()]
    groups = PaddedEngine(policy).generate(prompts, keys, Sampling(max_new_tokens=17), [])
    gaps = []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            row = torch.tensor([prompt + completion.tokens])
            with torch.no_grad():
                logprobs = policy.model(input_ids=row, use_cache=False).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            gaps.append((logprobs.gather(1, row[0, len(prompt) :, None])[:, 0] - completion.logprobs).abs().max())
    return max(gaps)


@pytest.mark.parametrize("architecture", REMEMBERS)
def test_every_kind_of_memory_is_handed_on(architecture):
    model = make(architecture, REMEMBERS[architecture]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert largest_gap(Policy(model, "padded")) < 1e-5


@pytest.mark.parametrize("architecture", FORGETS)
def test_a_model_that_forgets_is_run_on_the_whole_sequence(architecture):
    policy = Policy(make(architecture, FORGETS[architecture]), "padded")
    with pytest.warns(UserWarning, match="does not remember .* slower"):
        assert largest_gap(policy) < 1e-5


def test_a_memory_that_is_wrong_is_found_out():
    """Also where the mistake is small: a thousandth of what the tokens before do to a prediction."""
    model = make("qwen2", ATTENTION)
    plain = type(model).forward

    class Leaky(type(model)):
        def forward(self, input_ids=None, use_cache=None, cache=None, past_key_values=None):
            kept = {"cache": cache, "past_key_values": past_key_values}
            output = plain(self, input_ids=input_ids, use_cache=use_cache, **{k: v for k, v in kept.items() if v})
            if any(kept.values()):
                output["logits"] = output["logits"] * 1.002
            return output

    model.__class__ = Leaky
    with pytest.warns(UserWarning, match="nats off"):
        assert largest_gap(Policy(model, "padded")) < 1e-5


def test_a_model_that_can_t_run_in_its_precision_is_refused():
    model = make("xlstm", {**TINY, "num_heads": 4, "num_blocks": 2, "chunk_size": 8}).bfloat16()
    with pytest.raises(UserError, match=r"xLSTMForCausalLM can't be run with weights of the type torch.bfloat16"):
        PaddedEngine(Policy(model, "padded"))


@pytest.mark.parametrize("architecture", ["mamba", "mamba2", "qwen2"])
def test_in_bfloat16_the_memory_is_told_from_rounding(architecture):
    model = make(architecture, {**REMEMBERS, "qwen2": ATTENTION}[architecture]).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PaddedEngine(Policy(model, "padded"))
    plain = type(model).forward

    class Forgetful(type(model)):
        def forward(self, input_ids=None, use_cache=None, **others):
            return plain(self, input_ids=input_ids, use_cache=use_cache)

    other = make(architecture, {**REMEMBERS, "qwen2": ATTENTION}[architecture]).bfloat16()
    other.__class__ = Forgetful
    with pytest.warns(UserWarning, match="does not remember"):
        PaddedEngine(Policy(other, "padded"))


def test_a_set_of_lora_matrices_acts_in_sampling_alone():
    """The engine's policy samples with its own set, whichever acted last."""
    policy = Policy(make("mamba", REMEMBERS["mamba"]), "padded").with_adapter(Lora(rank=2), seed=0)
    with torch.no_grad():
        for _, parameter in policy.named_parameters():
            parameter.add_(0.1)
    start = Policy(policy.model, "padded", adapter=policy.adapter.off())
    keys = mix(torch.tensor(key("padded")), torch.arange(2)).view(1, 2)
    drawn = [PaddedEngine(p).generate([[5, 6]], keys, Sampling(max_new_tokens=8), []) for p in (policy, start)]
    assert (drawn[0][0][0].logprobs - drawn[1][0][0].logprobs).abs().max() > 1e-3
