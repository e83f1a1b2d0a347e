"""The same tensors through TRL's loss and through ours: the same number and the same gradients.

Where they differ, by design of either, the setting that makes them agree is named in VARIANTS.
"""

import warnings

import pytest
import torch

from coterie.fast.serve import Policy
from coterie.models.logprobs import logprobs_of
from coterie.recipe import make_recipe
from coterie.rollouts.pack import Row, make_stream
from coterie.tasks.equations import make_tokenizer
from coterie.training.loss_weights import first_loss_weights
from coterie.training.policy_update import optimise
from coterie.types import BatchTotals

trl = pytest.importorskip("trl", reason="the extra bench is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = [3, 4, 5]
COMPLETIONS = [[6, 7], [8, 9, 10, 11], [12], [13, 14, 15]]
ADVANTAGES = [1.2, -0.7, 0.4, -0.9]
LIMIT = 6
KL = {"use_bias_correction_kl": True}  # without the correction its gradient is not the KL's
OUR_KL = {"kl_weight": 0.1}
VARIANTS = {
    "grpo": ({"loss_type": "grpo"}, {"aggregation": "sequence_mean"}),
    "grpo_kl": ({"loss_type": "grpo", **KL}, {"aggregation": "sequence_mean", **OUR_KL}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"aggregation": "token_mean", "clip_high": 0.28}),
    "bnpo": ({"loss_type": "bnpo"}, {"aggregation": "token_mean"}),  # one micro-batch: ours counts over the whole step
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"aggregation": "fixed_length"}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1},
        {"ratio": "sequence_mean", "aggregation": "sequence_mean", "clip_low": 0.1, "clip_high": 0.1},
    ),
    "cispo": (  # TRL's epsilon_high is the bound itself, ours what is added to 1; it has no lower bound, nor have we at 1
        {"loss_type": "cispo", "epsilon_high": 1.2},
        {"objective": "cispo", "aggregation": "token_mean", "clip_low": 1.0, "clip_high": 0.2},
    ),
    "sapo": (
        {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
        {"objective": "sapo", "aggregation": "sequence_mean"},
    ),
}  # fmt: skip


def theirs(model, reference, old, settings, tmp_path):
    """TRL's loss, and the gradients it gives."""
    from datasets import Dataset

    config = trl.GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=LIMIT,
        temperature=0.8,
        bf16=False,
        **settings,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["x"] * 8}),
        processing_class=make_tokenizer(),
    )
    trainer.beta = (
        0.1 if "use_bias_correction_kl" in settings else 0.0
    )  # in the config it would load a reference by name
    longest = max(map(len, COMPLETIONS))

    def padded(rows):
        return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])

    lengths = torch.tensor([len(c) for c in COMPLETIONS])
    inputs = {
        "prompt_ids": torch.tensor([PROMPT] * 4),
        "prompt_mask": torch.ones(4, len(PROMPT), dtype=torch.long),
        "completion_ids": padded([torch.tensor(c) for c in COMPLETIONS]),
        "completion_mask": (torch.arange(longest) < lengths[:, None]).long(),
        "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": padded(old),
        "ref_per_token_logps": padded(reference),
        "num_items_in_batch": lengths.sum(),
    }
    model.eval()
    model.zero_grad()
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_and_its_gradients_are_trl_s(make_model, tmp_path, variant):
    trl_settings, ours = VARIANTS[variant]
    model, other, held = (make_model("qwen3", initializer_range=width) for width in (0.02, 0.1, 0.3))
    policy = Policy.of(model)
    zeros = [Row.written(c) for c in COMPLETIONS]
    plain = [make_stream([(PROMPT, zeros)])]
    lengths = [len(c) for c in COMPLETIONS]
    with torch.no_grad():
        near = 0.9 * logprobs_of(policy, plain, temperature=0.8)[0] + 0.1 * logprobs_of(Policy.of(other), plain, temperature=0.8)[0]  # fmt: skip
        old = list((near + 0.5 * torch.sin(torch.arange(sum(lengths)) * 1.7)).split(lengths))  # both bounds act
        reference = list(logprobs_of(Policy.of(held), plain, temperature=0.8)[0].split(lengths))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        their_loss, their_gradients = theirs(model, reference, old, trl_settings, tmp_path)
    values = {"preset": "dr_grpo", "model": "m", "task": {"data": "d"}, "rewards": ["m:f"], "loss": ours,
              "sampling": {"temperature": 0.8}}  # fmt: skip
    recipe = make_recipe(values)
    rows = [Row(c, logprobs, a) for c, logprobs, a in zip(COMPLETIONS, old, ADVANTAGES, strict=True)]
    tally, _ = optimise(
        policy,
        torch.optim.SGD(model.parameters(), lr=0.0),
        [make_stream([(PROMPT, rows)])],
        BatchTotals(4, sum(lengths), LIMIT),
        recipe,
        first_loss_weights(recipe),
        reference_logprobs=[torch.cat(reference)],
    )
    assert tally.values()["loss/total"] == pytest.approx(their_loss, abs=1e-5, rel=1e-5)
    norm = torch.cat([g.flatten() for g in their_gradients.values()]).norm()
    scale = min(1.0, (1.0 / (norm + 1e-6)).item())  # our step clips the norm at 1 before it is taken
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, scale * their_gradients[name], rtol=1e-4, atol=1e-5)
