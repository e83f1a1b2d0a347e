"""Two processes take the step that one takes."""

import os

import pytest
import torch
from torch import distributed, multiprocessing
from transformers import AutoConfig, AutoModelForCausalLM

from coterie.algorithms.advantages import group_advantages
from coterie.algorithms.aggregate import AGGREGATIONS
from coterie.fast.serve import Policy
from coterie.recipe import make_recipe
from coterie.recipe.presets import PRESETS
from coterie.rollouts.pack import Row, make_stream
from coterie.training.loss_weights import first_loss_weights
from coterie.training.policy_update import optimise
from coterie.types import BatchTotals

FIXED = {"model": "m", "task": {"data": "d"}, "rewards": ["m:f", "m:g"]}
CASES = {
    **{preset: {"preset": preset} for preset, values in PRESETS.items() if "method" not in values},
    **{f"by {name}": {"preset": "grpo", "loss": {"aggregation": name}} for name in AGGREGATIONS},
}


def gradient(groups, case):
    """The gradient that this process is left with after a step on its groups."""
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    policy = Policy.of(AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape)).double())
    optimiser = {"max_grad_norm": 1e9}
    recipe = make_recipe({**FIXED, **CASES[case], "optimiser": {**CASES[case].get("optimiser", {}), **optimiser}})
    lengths = [len(row.tokens) for _, rows in groups for row in rows]
    stream = make_stream(groups)
    reference = 0.1 * torch.cos(stream.targets.double()) - 3.4
    tally, _ = optimise(
        policy,
        torch.optim.SGD(policy.model.parameters(), lr=0.0),
        [stream],
        BatchTotals(len(lengths), sum(lengths), 9),
        recipe,
        first_loss_weights(recipe),
        reference_logprobs=[reference.float()],
    )
    assert tally.values()["optimiser/skipped_share"] == 0
    return torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])


def made_groups():
    """Four groups of three completions of different length, so that the halves have different counts."""
    generator = torch.Generator().manual_seed(2)
    rewards = torch.rand(4, 3, generator=generator)
    advantages = group_advantages(rewards)
    groups = []
    for p in range(4):
        rows = []
        for c in range(3):
            tokens = torch.randint(31, (1 + 2 * p + c,), generator=generator).tolist()
            rows.append(Row(tokens, torch.full((len(tokens),), -3.4), advantages[p, c].item(), rewards[p, c].item()))
        groups.append((torch.randint(31, (2 + p,), generator=generator).tolist(), rows))
    return groups


def work(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    half = made_groups()[:1] if rank == 0 else made_groups()[1:]  # one group, and three
    found = {case: gradient(half, case) for case in CASES}
    if rank == 0:
        torch.save(found, results)
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = tmp_path_factory.mktemp("processes") / "gradients.pt"
    multiprocessing.spawn(work, args=(port, str(results)), nprocs=2)
    return torch.load(results)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradient_of_one(of_two, case):
    one = gradient(made_groups(), case)
    assert one.abs().max() > 1e-5
    torch.testing.assert_close(of_two[case], one, rtol=1e-5, atol=1e-7)
