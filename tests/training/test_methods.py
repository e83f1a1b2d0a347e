"""Every preset and method trains, records its metrics, and resumes to the same bits."""

import json
import math
import sqlite3
import statistics
from itertools import pairwise

import pytest
import torch
from conftest import some_quick
from safetensors.torch import load_file
from small_runs import METHODS, digests, finished_on_letters, metrics, plan, recorded, select
from transformers import AutoModelForSequenceClassification

import coterie
from coterie.errors import UserError

OF_SAMPLING = {
    "reward/mean", "policy/entropy", "policy/kl", "completion/tokens_mean", "completion/truncated_share",
    "group/no_signal_share", "reward/letters_group_std", "policy/ratio_max", "loss/total", "optimiser/grad_norm", "optimiser/learning_rate",
}  # fmt: skip


@pytest.mark.parametrize("method", some_quick(METHODS, "ppo", "dpo"))
def test_every_method_trains_and_resumes_to_the_same_bits(train, method):
    whole = finished_on_letters(*METHODS[method])
    first, last = (load_file(whole / "checkpoints" / f"step_00000{n}" / "model.safetensors") for n in (0, 4))
    if method != "reward_model":  # it starts from another head
        assert any(not torch.equal(first[name], last[name]) for name in first)
    for step in range(1, 5):
        found = metrics(whole, step)
        assert all(math.isfinite(value) for value in found.values()), found
        assert found["optimiser/skipped_share"] == 0
        samples = method not in ("dpo", "reward_model", "sft")
        alone = {"group/no_signal_share", "reward/letters_group_std"} if "group_size=1" in METHODS[method] else set()
        assert not samples or found.keys() >= OF_SAMPLING - alone
    stopped = train("stopped", *METHODS[method], stop_after=3)
    assert not (stopped / "model").exists()
    coterie.train(resume=str(stopped))
    assert digests(stopped) == digests(whole)
    assert recorded(stopped) == recorded(whole)


def test_ppo_trains_a_value_model_and_saves_it():
    folder = finished_on_letters(*METHODS["ppo"])
    found = metrics(folder, 4)
    assert {"value/loss", "value/mean", "value/explained_variance"} <= found.keys()
    value = load_file(folder / "checkpoints" / "step_000004" / "value.safetensors")
    assert value["score.weight"].abs().max() > 0
    assert (folder / "checkpoints" / "step_000004" / "value_optimiser.safetensors").is_file()


def test_grpo_trains_about_half_of_what_ppo_trains():
    """Weights and optimiser state of a checkpoint: the value model is a second body, without the vocabulary's rows."""

    def trained_bytes(folder):
        files = (folder / "checkpoints" / "step_000004").glob("*.safetensors")
        return sum(tensor.numel() for file in files for tensor in load_file(file).values())

    grpo, ppo = (trained_bytes(finished_on_letters(*METHODS[method])) for method in ("grpo", "ppo"))
    assert 0.45 < grpo / ppo < 0.55


def test_a_moving_anchor_lets_the_policy_go_further(train):
    """The same samples and rewards; only what the anchor is made of differs, and with it the steps after the first."""
    runs = [train(kind, "preset=anchored", f"reference={{kind: {kind}}}", "steps=8") for kind in ("moving", "frozen")]
    first, last = ([metrics(run, step) for run in runs] for step in (1, 8))
    assert first[0]["loss/total"] == first[1]["loss/total"]
    assert last[0]["policy/kl"] < last[1]["policy/kl"]  # to their own references: the moving one follows


def test_the_policy_waits_while_the_value_model_warms_up(train):
    folder = train("run", *METHODS["ppo"], "value.warmup_steps=4", "steps=5", "checkpoint={every: 1}")
    first, last = (load_file(folder / "checkpoints" / f"step_00000{n}" / "model.safetensors") for n in (0, 4))
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_references_move_as_they_are_told(train):
    """frozen: the start. replaced: the policy of the last multiple. moving: an exponential average, saved with the rest."""
    folder = train(
        "replaced", "preset=grpo", "reference={kind: replaced, every: 2}", "checkpoint={every: 1, keep_last: 9}"
    )

    def saved(run, step, name):
        return load_file(run / "checkpoints" / f"step_00000{step}" / f"{name}.safetensors")

    for step, source in ((1, 0), (2, 2), (3, 2), (4, 4)):
        held, policy = saved(folder, step, "reference"), saved(folder, source, "model")
        assert all(torch.equal(held[name], policy[name]) for name in held), step
    folder = train("moving", "preset=anchored", "reference.decay=0.5", "checkpoint={every: 1, keep_last: 9}")
    average = saved(folder, 0, "model")
    for step in range(1, 5):
        policy = saved(folder, step, "model")
        average = {name: 0.5 * average[name] + 0.5 * policy[name] for name in average}
        for name, held in saved(folder, step, "reference").items():
            torch.testing.assert_close(held, average[name], rtol=1e-5, atol=1e-7)
    assert metrics(finished_on_letters(*METHODS["grpo"]), 1)["policy/kl"] == pytest.approx(0, abs=1e-8)


def test_weights_that_adapt_move_towards_their_target():
    folder = finished_on_letters(*METHODS["adaptive"])
    weights = [metrics(folder, step) for step in range(1, 5)]
    assert weights[0]["loss/kl_weight"] == 0.1
    assert weights[1]["loss/kl_weight"] == pytest.approx(0.09)  # at the start the KL is 0, below its target
    for before, after in pairwise(weights):
        lacking = 5.0 - before["policy/entropy"]
        assert after["loss/entropy_weight"] == pytest.approx(before["loss/entropy_weight"] + 1e-3 * lacking)


@pytest.mark.parametrize("preset", ["rloo", "ppo"])
def test_a_weight_that_adapts_acts_in_the_reward_too(train, preset):
    """Two runs with equal samples until the second step, whose KL is weighed by what each controller made of the first."""
    values = {}
    for rate in (0.1, 0.5):
        adapts = [f"kl={{target: 100.0, adapt_rate: {rate}}}", "loss={kl_weight: 0.5}", "steps=2"]
        folder = train(f"run_{rate}", f"preset={preset}", *adapts, "optimiser.learning_rate=0.01")
        first, second = metrics(folder, 1), metrics(folder, 2)
        assert first["loss/kl_weight"] == 0.5
        assert second["loss/kl_weight"] == pytest.approx(0.5 * (1 - rate))
        values[rate] = second
    if preset == "rloo":
        lower = values[0.5]["loss/kl_weight"] / values[0.1]["loss/kl_weight"]
        assert values[0.1]["reward/kl"] != 0
        assert values[0.5]["reward/kl"] == pytest.approx(lower * values[0.1]["reward/kl"])
    else:
        assert values[0.5]["value/loss"] != values[0.1]["value/loss"]


@pytest.mark.parametrize("preset", ["grpo", "ppo"])
def test_the_spread_of_every_part_within_groups_is_a_metric(preset):
    folder = finished_on_letters(*METHODS[preset])
    rows = select(folder, "SELECT prompt_number, reward_parts FROM completions WHERE step = 1")
    for part in ("letters", "short"):
        groups = [[json.loads(parts)[part] for n, parts in rows if n == number] for number in range(3)]
        wanted = sum(statistics.stdev(group) for group in groups) / 3
        assert wanted > 0
        assert metrics(folder, 1)[f"reward/{part}_group_std"] == pytest.approx(wanted, rel=1e-12)


def test_dynamic_sampling_counts_what_it_drops(train, tmp_path):
    """A reward that is the same for most groups: others are drawn in their place, and the tokens are counted."""
    (tmp_path / "rare.py").write_text(
        "def rare(prompts, completions, **columns):\n"
        "    return [len(c[0]['content']) if '解' in p[0]['content'] else 1.0 for p, c in zip(prompts, completions)]\n"
    )
    folder = train("run", "preset=dapo", "overlong=", f"rewards={tmp_path}/rare.py:rare", "steps=6")
    with sqlite3.connect(folder / "run.db") as db:
        for step in range(1, 7):
            found = metrics(folder, step)
            rows = db.execute(
                "SELECT prompt_number, reward, advantage, tokens FROM completions WHERE stage = 'train' AND step = ?",
                (step,),
            ).fetchall()
            flat = {n for n, *_ in rows if len({r for m, r, *_ in rows if m == n}) == 1}
            assert found.get("dynamic_sampling/num_dropped_groups", 0) == len(flat)
            assert len({n for n, *_ in rows}) >= 3
            assert all(advantage == 0 for n, _, advantage, _ in rows if n in flat)
            assert found["group/no_signal_share"] == pytest.approx(len(flat) / len({n for n, *_ in rows}))
    assert any(metrics(folder, step).get("dynamic_sampling/num_dropped_tokens", 0) > 0 for step in range(1, 7))


def test_overlong_completions_lose_over_the_last_tokens(train):
    folder = train("run", "preset=grpo", "overlong={treatment: punish, margin: 0.5, penalty: 2.0}", "steps=2")
    with sqlite3.connect(folder / "run.db") as db:
        rows = db.execute("SELECT tokens, json_extract(reward_parts, '$.overlong') FROM completions").fetchall()
    lengths = [tokens.count(",") + 1 for tokens, _ in rows]
    assert max(lengths) == 12  # the limit
    for length, (_, part) in zip(lengths, rows, strict=True):
        assert part == pytest.approx(-2.0 * min(1, max(0, (length - 6) / 6)))


def test_the_kl_in_the_reward_is_a_part_of_its_own(train):
    folder = train("run", "preset=rloo", "loss={kl_weight: 0.5}", "steps=3", "optimiser.learning_rate=0.01")
    with sqlite3.connect(folder / "run.db") as db:
        rows = db.execute("SELECT step, reward, reward_parts FROM completions ORDER BY step").fetchall()
    parts = [(step, reward, json.loads(of)) for step, reward, of in rows]
    for _, reward, of in parts:
        assert reward == pytest.approx(of["letters"] + of["short"] + of["kl"])
    assert all(abs(of["kl"]) < 1e-4 for step, _, of in parts if step == 1)
    assert any(abs(of["kl"]) > 1e-3 for step, _, of in parts if step == 3)
    of_last = [of["kl"] for step, _, of in parts if step == 3]
    assert metrics(folder, 3)["reward/kl"] == pytest.approx(sum(of_last) / len(of_last))


def test_a_reward_model_learns_to_rank_and_loads_in_transformers(train):
    folder = train(
        "run", *METHODS["reward_model"], "steps=60", "prompts_per_step=16", "optimiser={learning_rate: 3.0e-3}"
    )
    with sqlite3.connect(folder / "run.db") as db:
        estimates = db.execute(
            "SELECT step, value, low, high FROM evaluations WHERE mode = 'pairs' AND name = 'accuracy' ORDER BY step"
        ).fetchall()
    assert estimates[0][1] == 0  # scores start equal, and equal is not right
    assert estimates[-1][1] > 0.6
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert model.config.num_labels == 1
    assert metrics(folder, 60)["preference/accuracy"] > metrics(folder, 1)["preference/accuracy"]


def test_dpo_moves_the_chosen_above_the_rejected(train):
    folder = train("run", *METHODS["dpo"], "steps=30", "prompts_per_step=8")
    first, last = metrics(folder, 1), [metrics(folder, step) for step in range(21, 31)]
    assert first["loss/total"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["preference/margin"] == pytest.approx(0, abs=1e-4)
    assert all(step["loss/total"] < first["loss/total"] for step in last)
    assert (
        sum(step["preference/accuracy"] for step in last) / 10 > 0.7
    )  # of 80 pairs: chance would have to be 3.5 sigma off


@pytest.mark.parametrize(
    ("body", "setting", "said"),
    [
        ("def f(terms): return terms.ratio('token').sum()", "loss={objective: FILE:f}", "one loss per token"),
        ("def f(terms, *, clip_lo): return terms.log_ratio", "loss={objective: FILE:f}", "clip_lo"),
        ("g = 1", "loss={objective: FILE:f}", "no function 'f'"),
        ("def f(rewards): return rewards[0]", "advantage={function: FILE:f}", "one number per completion"),
        ("def f(rewards): return rewards / 0", "advantage={function: FILE:f}", "not finite"),
        ("def f(rewards, *, scal): return rewards", "advantage={function: FILE:f}", "scal"),
    ],
)
def test_what_is_wrong_with_a_users_function_is_said(train, tmp_path, body, setting, said):
    (tmp_path / "mine.py").write_text(body + "\n")
    with pytest.raises(UserError, match=said):
        train("run", "preset=dr_grpo", setting.replace("FILE", f"{tmp_path}/mine.py"))


@pytest.mark.parametrize("method", some_quick(["ppo", "anchored", "reward_model", "grpo"], "ppo"))
def test_a_run_that_died_before_its_first_checkpoint_resumes(train, method, monkeypatch):
    """Only the start of the method's own stage is saved, which holds the policy alone."""
    settings = [*METHODS[method], "checkpoint={every: 100}", "cold_start.steps=1"]
    whole = train("whole", *settings)
    plan("in_record:2:raise", monkeypatch.setattr)
    with pytest.raises(RuntimeError, match="on purpose"):
        train("died", *settings)
    died = whole.with_name("died")
    assert [path.name for path in (died / "checkpoints").glob("step_*")] == ["step_000000"]
    coterie.train(resume=str(died))
    assert digests(died) == digests(whole)
    assert recorded(died) == recorded(whole)


@pytest.mark.parametrize("method", some_quick(["rloo", "ppo", "grpo", "gdpo"], "rloo", "ppo"))
def test_steps_in_which_every_completion_abstains_are_survived(train, tmp_path, method):
    """The first call is in the evaluation before training, each other one in a step."""
    (tmp_path / "late.py").write_text(
        "calls = []\ndef late(completions, **columns):\n    calls.append(1)\n"
        "    return [float(len(c[0]['content'])) if len(calls) > 4 else None for c in completions]\n"
    )
    folder = train("run", *METHODS[method], f"rewards={tmp_path}/late.py:late", "steps=5")
    found = [metrics(folder, step) for step in range(1, 6)]
    with sqlite3.connect(folder / "run.db") as db:
        sizes = [db.execute("SELECT COUNT(*) FROM completions WHERE step = ?", (n,)).fetchone()[0] for n in range(1, 6)]
    silent = [one["reward/num_abstained"] == size for one, size in zip(found, sizes, strict=True)]
    assert silent[0]
    assert not silent[-1]
    assert silent == sorted(silent, reverse=True)
    assert all(one["optimiser/skipped_share"] == 0 for one in found)


def test_dynamic_sampling_keeps_a_group_that_differs_in_its_parts_alone(train, tmp_path):
    (tmp_path / "two.py").write_text(
        "def more(completions, **columns):\n    return [float(len(c[0]['content'])) for c in completions]\n"
        "def less(completions, **columns):\n    return [-float(len(c[0]['content'])) for c in completions]\n"
    )
    rewards = f"rewards=['{tmp_path}/two.py:more', '{tmp_path}/two.py:less']"
    folder = train("run", "preset=gdpo", "dynamic_sampling.rounds=2", rewards, "steps=2", "sampling.max_new_tokens=30")
    assert metrics(folder, 1).get("dynamic_sampling/num_dropped_groups", 0) == 0
    assert metrics(folder, 1)["group/no_signal_share"] == 0


@pytest.mark.slow
def test_more_steps_given_to_a_resumed_run_are_kept(train):
    folder = train("run", "preset=dr_grpo", "steps=2")
    coterie.train(resume=str(folder), overrides=["steps=6"], stop_after=4)
    coterie.train(resume=str(folder))
    assert metrics(folder, 6)
    assert (folder / "checkpoints" / "step_000006").exists()


def test_a_reward_model_is_not_sampled_from(train):
    from coterie.fast.serve import load_policy

    folder = train("run", *METHODS["reward_model"], "steps=1")
    with pytest.raises(UserError, match="reward model"):
        load_policy(str(folder / "model"), torch.device("cpu"))


def test_the_reward_stands_at_the_last_token_and_the_kl_at_each():
    """By hand, with a lambda of 0: reward and next value, less the penalty and what was expected."""
    from coterie.recipe import make_recipe
    from coterie.rollouts.pack import Row, make_stream
    from coterie.training.ppo import advantages_and_returns, whitened

    rows = [Row([4, 5, 6], torch.zeros(3), reward=3.0), Row([7], torch.zeros(1), reward=5.0)]
    recipe = make_recipe(
        {
            "preset": "ppo", "model": "m", "task": "equations", "rewards": ["m:f"],
            "value": {"gae_lambda": 0.0, "discount": 0.5},
        }
    )  # fmt: skip
    values, penalties = torch.tensor([1.0, 2.0, 4.0, 10.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    (advantages,), (returns,) = advantages_and_returns([make_stream([([1], rows)])], [values], [penalties], recipe)
    expected = [-0.1 + 1.0 - 1, -0.2 + 2.0 - 2, 3 - 0.3 - 4, 5 - 0.4 - 10]
    torch.testing.assert_close(advantages, torch.tensor(expected))
    torch.testing.assert_close(returns, torch.tensor(expected) + values)
    white = torch.cat(whitened([advantages[:1], advantages[1:]]))
    assert white.mean().item() == pytest.approx(0, abs=1e-6)
    assert white.std().item() == pytest.approx(1, abs=1e-6)


def test_the_value_model_s_loss_is_held_near_what_it_said_before(make_model):
    """A value that ran ahead of the clip towards its return pays for the distance from the clip's edge, and has no gradient."""
    from coterie.fast.serve import Policy
    from coterie.models.heads import Scorer
    from coterie.recipe import make_recipe
    from coterie.rollouts.pack import Row, make_stream
    from coterie.training.ppo import fit_values
    from coterie.types import BatchTotals

    value = Scorer.from_policy(Policy.of(make_model("qwen3")))
    recipe = make_recipe({"preset": "ppo", "model": "m", "task": "equations", "rewards": ["m:f"],
                          "value": {"clip": 0.25}, "optimiser": {"updates_per_batch": 1}})  # fmt: skip
    stream = make_stream([([1, 2], [Row([4, 5, 6], torch.zeros(3))])])
    optimiser = torch.optim.SGD((p for _, p in value.named_parameters()), lr=1.0)
    before = value.model.score.weight.detach().clone()
    old, returns = torch.full((3,), -1.0), torch.full((3,), 0.5)  # the head is 0: each value is 0
    tally = fit_values(value, optimiser, [stream], BatchTotals(1, 3, 8), [old], [returns], recipe)
    assert tally.values()["value/loss"] == pytest.approx((-1 + 0.25 - 0.5) ** 2 / 2)
    assert torch.equal(value.model.score.weight, before)
    fit_values(value, optimiser, [stream], BatchTotals(1, 3, 8), [old + 1.1], [returns], recipe)
    assert not torch.equal(value.model.score.weight, before)
