"""LoRA's matrices: nothing at the start, the only thing that is trained, and a plain model again at the end."""

from dataclasses import replace

import pytest
import torch
from conftest import SHAPES, some_quick
from small_streams import policy_of
from transformers import AutoConfig, AutoModelForCausalLM

from coterie.errors import UserError
from coterie.fast.serve import Policy
from coterie.models.adapters import check_lora, num_in_experts, target_layers
from coterie.models.heads import Scorer
from coterie.models.logprobs import token_logprobs
from coterie.recipe.settings import Lora, Reference
from coterie.rollouts.pack import Row, make_stream
from coterie.training.reference import make_reference, move_reference

STREAM = make_stream(
    [(prompt, [Row.written(c) for c in completions]) for prompt, completions in [
        ([3, 4, 5], [[6, 7], [8, 9, 10, 11], [12]]), ([13], [[14, 15, 16]]), ([17, 18, 19, 20], [[21], [22, 23]])
    ]]
)  # fmt: skip


def logprobs(policy):
    with torch.no_grad():
        return token_logprobs(policy, STREAM)


def stir(trained, scale=0.1, seed=5):
    """Give the matrices values that training might give them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in trained.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.mark.parametrize("architecture", some_quick(SHAPES, "qwen3", "gemma2"))
def test_off_it_is_the_start_and_merged_it_is_the_policy(make_model, architecture):
    """To the bit, and the model's own weights stay as they are until they are merged."""
    model = make_model(architecture)
    plain = policy_of(model)
    start, before = logprobs(plain), {name: p.clone() for name, p in model.named_parameters()}
    policy = plain.with_adapter(Lora(rank=3, alpha=5), seed=0)
    reference = make_reference(policy, Reference())
    assert torch.equal(logprobs(policy), start)
    stir(policy)
    moved = logprobs(policy)
    assert (moved - start).abs().max() > 0.1
    assert torch.equal(logprobs(reference), start)
    assert torch.equal(logprobs(policy), moved)  # switched back
    names = dict(model.named_parameters())
    for name, weight in before.items():
        (held,) = (p for n, p in names.items() if n.replace(".base_layer.", ".") == name)
        assert torch.equal(held, weight), name
    policy.adapter.merge()
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logprobs(plain), moved, rtol=0, atol=2e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma2", "doge"])
def test_only_the_matrices_have_gradients_and_they_are_right(make_model, architecture):
    """Against the gradient of the merged weight W: dL/dB = dL/dW A^T alpha / rank."""
    model = make_model(architecture)
    policy = policy_of(model).with_adapter(Lora(rank=3, alpha=6), seed=0)
    stir(policy)
    token_logprobs(policy, STREAM).sin().sum().backward()
    own = {id(parameter) for _, parameter in policy.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in own), name
    found = {name: (p.detach().clone(), p.grad.clone()) for name, p in policy.named_parameters()}
    places = list(policy.adapter.layers)
    policy.adapter.merge()
    token_logprobs(policy_of(model), STREAM).sin().sum().backward()
    for place in places:
        of_weight = model.get_submodule(place).weight.grad
        of_weight = of_weight.T if architecture == "gpt2" else of_weight
        (a, of_a), (b, of_b) = found[f"{place}.lora_A"], found[f"{place}.lora_B"]
        torch.testing.assert_close(of_b, of_weight @ a.T * 2, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(of_a, b.T @ of_weight * 2, rtol=1e-3, atol=1e-4)


def test_policy_reference_and_scorer_share_one_set_of_weights(make_model):
    model = make_model("qwen3")
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    policy = Policy.of(model).with_adapter(Lora(rank=2), seed=0)
    moving = make_reference(policy, Reference(kind="moving"))
    frozen = make_reference(policy, Reference())
    scorer = Scorer.from_policy(frozen)
    of_sets = {p.data_ptr() for holder in (policy, moving, scorer) for _, p in holder.named_parameters()}
    for holder in (policy, moving, frozen, scorer):
        held = {parameter.data_ptr() for parameter in holder.model.parameters()}
        assert held <= weights | of_sets
    assert list(frozen.named_parameters()) == []
    # rank * (in + out) of 7 layers in each of 2 blocks: q 32 + 32, k and v 32 + 16, o 32 + 32, gate, up and down 32 + 48
    per_block = 2 * (64 + 48 + 48 + 64 + 3 * 80)
    for holder, more in ((policy, 0), (moving, 0), (scorer, 32)):
        assert sum(p.numel() for _, p in holder.named_parameters()) == 2 * per_block + more
    assert sum(p.numel() for p in model.parameters()) == num_weights + 3 * 2 * per_block


def test_a_moving_reference_moves_by_its_own_matrices(make_model):
    policy = Policy.of(make_model("llama")).with_adapter(Lora(rank=2), seed=0)
    stir(policy)
    references = {
        kind: make_reference(policy, Reference(kind=kind, decay=0.75, every=2)) for kind in ("moving", "frozen")
    }
    at_start = [p.clone() for _, p in references["moving"].named_parameters()]
    assert torch.equal(logprobs(references["moving"]), logprobs(policy))
    stir(policy, seed=6)
    move_reference(references["moving"], policy, Reference(kind="moving", decay=0.75), 1)
    for held, (_, moved), (_, trained) in zip(
        at_start, references["moving"].named_parameters(), policy.named_parameters(), strict=True
    ):
        torch.testing.assert_close(moved, 0.75 * held + 0.25 * trained)
        assert not moved.requires_grad
        assert trained.requires_grad
    move_reference(references["moving"], policy, Reference(kind="replaced", every=2), 2)
    assert torch.equal(logprobs(references["moving"]), logprobs(policy))


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "doge"])
def test_two_sets_of_one_model_learn_apart(make_model, architecture, recomputes):
    """A scorer's backward pass finds its own matrices, though the policy's act again by then."""
    policy = policy_of(make_model(architecture))
    policy = (policy.recomputing() if recomputes else policy).with_adapter(Lora(rank=2), seed=0)
    scorer = Scorer.from_policy(make_reference(policy, Reference()))
    stir(policy)
    assert (scorer.values(STREAM) == 0).all()
    torch.nn.init.ones_(scorer.model.score.weight)
    stir(scorer, seed=8)
    scorer.values(STREAM).sin().sum().backward()
    assert all(p.grad is None for _, p in policy.named_parameters())
    gradients = {name: p.grad.clone() for name, p in scorer.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())

    alone = policy_of(make_model(architecture)).with_adapter(
        Lora(rank=2), seed=0
    )  # its policy's set does the scorer's work
    with torch.no_grad():
        for (_, own), (_, other) in zip(alone.named_parameters(), scorer.adapter.named_parameters(), strict=True):
            own.copy_(other)
    plain = Scorer(scorer.model, replace(alone, model=alone.model.base_model))
    plain.values(STREAM).sin().sum().backward()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_the_random_start_depends_on_the_seed_alone(make_model):
    state = torch.random.get_rng_state()

    def matrices(seed):
        return [p for _, p in Policy.of(make_model("qwen3")).with_adapter(Lora(rank=2), seed=seed).named_parameters()]

    first, again, other = matrices(1), matrices(1), matrices(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    model = make_model("qwen3")
    state = torch.random.get_rng_state()
    Policy.of(model).with_adapter(Lora(rank=2), seed=3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_matrices_of_a_bfloat16_model_are_float32(make_model):
    policy = policy_of(make_model("qwen3").bfloat16()).with_adapter(Lora(rank=2), seed=0)
    assert {p.dtype for _, p in policy.named_parameters()} == {torch.float32}
    stir(policy)
    token_logprobs(policy, STREAM).sum().backward()
    assert all(p.grad.dtype == torch.float32 for _, p in policy.named_parameters())
    policy.adapter.merge()
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("architecture", "targets", "count"),
    [
        ("qwen3", ["all-linear"], 14),
        ("qwen3", ["q_proj", "v_proj"], 4),
        ("qwen3", ["layers.1.self_attn.q_proj", "up_proj"], 3),
        ("gpt2", ["c_attn"], 2),
        ("gpt2", ["attn.c_proj"], 2),
        ("phi3", ["qkv_proj"], 2),
    ],
)
def test_targets_are_names_of_layers(make_model, architecture, targets, count):
    model = make_model(architecture)
    places = target_layers(model, Lora(targets=targets))
    assert len(places) == count
    policy = Policy.of(model).with_adapter(Lora(rank=1, targets=targets), seed=0)
    assert len(list(policy.named_parameters())) == 2 * count


@pytest.mark.parametrize("target", ["q_prj", "proj", "lm_head", "embed_tokens", "norm", "self_attn"])
def test_a_target_that_matches_nothing_is_told_what_there_is(make_model, target):
    model = make_model("qwen3")
    for check in (lambda s: target_layers(model, s), lambda s: check_lora(model.config, s)):
        with pytest.raises(UserError, match=f"lora.targets: '{target}' .* q_proj, k_proj, v_proj, o_proj"):
            check(Lora(targets=["v_proj", target]))


def test_without_peft_the_extra_is_named(make_model, monkeypatch):
    monkeypatch.setattr("coterie.models.adapters.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'coterie\[lora\]'"):
        check_lora(make_model("qwen3").config, Lora())


def test_a_merged_model_is_saved_as_any_other(make_model, tmp_path):
    policy = Policy.of(make_model("qwen2")).with_adapter(Lora(rank=2), seed=0)
    stir(policy)
    moved = logprobs(policy)
    policy.adapter.merge()
    policy.model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    torch.testing.assert_close(
        logprobs(Policy.of(AutoModelForCausalLM.from_pretrained(tmp_path))), moved, rtol=0, atol=1e-5
    )


MANY = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None}  # fmt: skip
EXPERTS = {
    "qwen3_moe": {**MANY, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": {**MANY, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                   "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v3": {**MANY, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
                    "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                    "v_head_dim": 8, "first_k_dense_replace": 1},
    "glm4_moe": {**MANY, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                 "first_k_dense_replace": 1},
    "ernie4_5_moe": {**MANY, "moe_num_experts": 4, "moe_k": 2},
    "mixtral": {**MANY, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {**MANY, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
    "phimoe": {**MANY, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
ODD = {
    "zamba": {**MANY, "num_hidden_layers": 6, "num_key_value_heads": 4, "attn_layer_period": 3, "attn_layer_offset": 2,
              "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_d_state": 8, "mamba_dt_rank": 4,
              "n_mamba_heads": 2, "use_mamba_kernels": False},
    "zamba2": {**MANY, "num_hidden_layers": 5, "num_key_value_heads": 4, "num_mem_blocks": 1, "attention_hidden_size": 64,
               "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"], "attention_head_dim": 16,
               "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "use_mamba_kernels": False},
    "mamba": {"vocab_size": 61, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
    "falcon_mamba": {"vocab_size": 61, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
    "falcon": {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
}  # fmt: skip


def make_odd(architecture, dtype=torch.float32):
    torch.manual_seed(1)
    config = AutoConfig.for_model(architecture, **{**EXPERTS, **ODD}[architecture])
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(22).view(2, 11), use_cache=False).logits.float()


@pytest.mark.parametrize("architecture", [*EXPERTS, *ODD])
def test_merged_experts_routers_and_shared_layers_are_as_trained(architecture, tmp_path):
    """Every matrix that is trained acts, a weight in two layers gets its own sum once, and what is saved is the same again."""
    model = make_odd(architecture)
    start, names = logits_of(model), dict(model.named_parameters()).keys()
    policy = Policy(model, "padded").with_adapter(Lora(rank=3, alpha=5), seed=0)
    assert torch.equal(logits_of(model), start)
    stir(policy, scale=0.05)
    moved = logits_of(model)
    assert (moved - start).abs().max() > 1e-3
    model(input_ids=torch.arange(22).view(2, 11), use_cache=False).logits.log_softmax(-1).sin().sum().backward()
    assert all(parameter.grad is not None for _, parameter in policy.named_parameters())
    policy.adapter.merge()
    assert dict(model.named_parameters()).keys() == names
    torch.testing.assert_close(logits_of(model), moved, rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(saved), moved, rtol=0, atol=2e-5)


@pytest.mark.parametrize("architecture", EXPERTS)
def test_stacks_of_experts_are_left_alone_and_counted(architecture):
    model = make_odd(architecture)
    stacks = {name: p.clone() for name, p in model.named_parameters() if ".experts." in name}
    assert num_in_experts(model) == sum(stack.numel() for stack in stacks.values()) > 0
    policy = Policy(model, "padded").with_adapter(Lora(rank=2), seed=0)
    stir(policy)
    policy.adapter.merge()
    assert all(torch.equal(dict(model.named_parameters())[name], stack) for name, stack in stacks.items())


@pytest.mark.parametrize("architecture", ["zamba", "zamba2"])
def test_layers_with_one_weight_have_one_pair_of_matrices(architecture):
    model = make_odd(architecture)
    places = target_layers(model, Lora())
    shared = [modules for modules in places.values() if len(modules) > 1]
    weights = [module.weight for modules in places.values() for module in modules[:1]]
    assert len(set(weights)) == len(weights)
    # The products of a layer that stands in two places, and for Zamba 2 those of its own adapters
    assert len(shared) == {"zamba": 7, "zamba2": 10}[architecture]


@pytest.mark.parametrize("architecture", ["mamba", "falcon_mamba", "qwen3_moe", "zamba2"])
def test_odd_models_learn_in_bfloat16(architecture):
    policy = Policy(make_odd(architecture, torch.bfloat16), "padded").with_adapter(Lora(rank=2), seed=0)
    token_logprobs(policy, STREAM).sum().backward()
    assert all(p.grad.isfinite().all() for _, p in policy.named_parameters())
