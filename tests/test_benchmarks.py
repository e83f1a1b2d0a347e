"""What measures, measures what it says. What was measured and is committed, benchmarks/test_results.py checks."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_code import load
from transformers import AutoConfig, AutoModelForCausalLM

from coterie.tasks.arithmetic import make_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run_quickly(tmp_path):
    """Run a measurement with tiny sizes: what it wrote as JSON."""

    def run(name):
        command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--out", str(tmp_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"{name}.md").read_text() in done.stdout
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert {"command", "commit", "versions", "hardware", "dtype", "rounds"} <= found.keys()
        return found

    return run


@pytest.mark.slow
def test_scaling_measures_every_axis_on_both_sides(run_quickly):
    found = run_quickly("scaling")
    assert found["axes"].keys() == {"group", "prompt_tokens", "new_tokens", "vocabulary", "model"}
    for axis in found["axes"].values():
        for work in ("training", "sampling"):
            assert [point["x"] for point in axis[work]["points"]] == axis["x"]
            for point in axis[work]["points"]:
                assert point["stream"]["seconds"] > 0
                assert point["copies"]["seconds"] > 0
            assert axis[work]["growth"].keys() == {"stream", "copies"}
    (of_width,) = found["large_vocabulary"]["widths"].values()
    assert max(of_width["relative_error"].values()) <= 1e-5
    assert of_width["held"]["error"]
    assert 0 < of_width["chunks / all"]["megabytes"]["median"] < 1  # fewer logits are held than there are
    doubled = found["doubled_group"]
    assert doubled["held"]["net"] == (doubled["stream"]["net"]["median"] <= 1.15)


@pytest.mark.slow
def test_roofline_measures_the_machine_and_the_work(run_quickly):
    found = run_quickly("roofline")
    step = found["step"]
    work = step["flop"]["linear"] + step["flop"]["attention"]
    assert step["flop_per_second"]["median"] == pytest.approx(work / step["seconds"]["median"], rel=1e-2)
    assert step["held"] == (step["of_matrix_rate"]["median"] >= 0.5)
    assert [one["rows"] for one in found["decode"]] == [1, 2, 4]
    assert all(one["flop_per_step"] == one["rows"] * found["decode"][0]["flop_per_step"] for one in found["decode"])


@pytest.mark.slow
def test_generation_writes_the_same_tokens_on_every_side(run_quickly):
    found = run_quickly("generation")
    assert found["cases"]
    for case in found["cases"]:
        rows = case["prompts"] * case["group"]
        assert (case["tokens"] < rows * found["new_tokens"]) == (case["kind"] == "ragged")
        for side in ("native", "dynamic", "static"):
            assert case[side]["same_tokens"] == 1.0, (side, case)
        assert case["continuous"].get("same_tokens", 1.0) == 1.0
        assert case["held"] == (case[f"{case['faster_cache']} / native"]["seconds"]["median"] >= 1.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_steps_of_both_trainers_are_measured_in_turn(tmp_path):
    pytest.importorskip("trl", reason="the extra bench is not installed")
    versus = load("versus_trl")
    versus.make_start(tmp_path, versus.WORKLOADS["short"], steps=5)
    found = versus.compare(tmp_path, "short", 3, 0, "generate")
    for side in found.values():
        assert len(side["rewards"]) == 3
        assert side["step_seconds"] > 0
        assert side["peak_megabytes"] > 10
    judged = versus.judged([found], {"speed_up": 1e9})
    assert judged["speed_up"] == pytest.approx(found["trl"]["step_seconds"] / found["coterie"]["step_seconds"])
    assert judged["speed_up_held"] is False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_pretrained_model_is_trained_by_both_trainers_on_equal_work(tmp_path):
    pytest.importorskip("trl", reason="the extra bench is not installed")
    out = tmp_path / "out"
    out.mkdir()
    make_folder(tmp_path / "model")

    def run(*options):
        command = [
            sys.executable,
            "benchmarks/versus_trl.py",
            "--real",
            "--model",
            str(tmp_path / "model"),
            "--out",
            str(out),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, "--workloads", "32", "--precision", "mixed", *options], cwd=ROOT, env=environment, capture_output=True,
            text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((out / "versus_trl_real.json").read_text())["parts"]

    run("--rounds", "2", "--signal", "half", "--settings", "16", "8")
    run("--rounds", "1", "--warmup", "0", "--signal", "all", "--settings", "16", "--lora")
    parts = run("--curves", "--steps", "1", "--settings", "16")
    half, adapted = parts["mixed, 32 tokens, half"], parts["mixed, LoRA, 32 tokens, all"]
    assert all({"command", "commit", "versions", "hardware"} <= part.keys() for part in parts.values())
    for part, silent in ((half, 0.5), (adapted, 0.0)):
        for side in ("trl", "coterie"):
            found = part["result"][side]
            assert found["tokens_per_completion"] == 32  # none ends early
            assert found["silent_share"] == silent
            assert 0 < found["sampling_share"] < 1
            assert found["process_megabytes"] > found["peak_megabytes"] > 0
    assert len(half["result"]["speed_up_by_round"]) == 2
    assert half["result"]["held"].keys() == {"speed_up", "memory_share"}
    assert half["settings"] in parts["TRL's settings: mixed, 32 tokens, half"]["tried"]
    curves = parts["curves: mixed, 32 tokens, answers"]["curves"]
    for side in ("trl", "coterie"):
        assert len(curves[side]["rewards"]) == 1
        assert curves[side]["last"]["count"] == 64
    rows = (out / "versus_trl_real.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| mixed, 32 tokens, half", "| mixed, LoRA, 32 tokens, all"]


def make_folder(folder):
    """A tiny Llama that never writes its end token, in Hugging Face format, with a tokenizer that has a chat template."""
    tokenizer = make_tokenizer()
    settings = dict(
        load("measure").SIZES["tiny"],
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **settings, bos_token_id=None, pad_token_id=0)
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = (
            10.0  # every hidden state points there, and the end token's row away
        )
        model.get_output_embeddings().weight[tokenizer.eos_token_id, 0] = -10.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_growth_is_fitted():
    measure = load("measure")
    assert measure.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert measure.line([1, 2, 4], [5, 7, 11]) == pytest.approx({"start": 3, "slope": 2, "explained": 1})


def test_sides_are_measured_in_turn_and_compared_round_by_round():
    measure = load("measure")
    order = []

    def side(name, seconds):
        times = iter(seconds)
        return lambda: order.append(name) or {"seconds": next(times)}

    found = measure.in_turn({"a": side("a", [4, 2, 9]), "b": side("b", [2, 2, 3])}, 3)
    assert order == list("ababab")
    assert measure.ratios(found["a"], found["b"], "seconds") == {"median": 2, "range": [1, 3]}
    assert measure.middle(found["a"], "seconds") == 4


def test_peak_memory_is_of_what_was_held_at_once():
    measure = load("measure")
    before = torch.ones(20_000_000)  # 80 MB that come and go before
    del before
    memory = measure.PeakMemory(measure.Place())
    for _ in range(3):  # 40 MB at a time
        torch.ones(10_000_000)
    assert memory.megabytes() == pytest.approx(40, abs=4)


def test_the_work_of_a_step_is_counted_as_by_hand():
    measure, roofline = load("measure"), load("roofline")
    policy = measure.make_policy("tiny", measure.Place())
    prompts, group, prompt, new = 2, 3, 5, 4
    streams, totals = roofline.batch(policy, prompts, group, prompt, new)
    num_tokens, num_written = prompts * (prompt + group * new), prompts * group * new
    before, after = 32 * 32 + 2 * 32 * 16, 32 * 32 + 3 * 32 * 64  # queries, keys and values; output, three of the MLP
    places = prompts * (
        1 + group * (new - 1)
    )  # that predict a token: where the second and last layer goes on after attention
    by_hand = 3 * 2 * ((2 * before + after) * num_tokens + after * places + 32 * 64 * num_written)
    assert roofline.linear_flop(lambda: roofline.all_at_once(policy, streams)) == by_hand
    pairs = sum(range(1, prompt + 1)) + group * sum(range(prompt + 1, prompt + new + 1))
    assert roofline.attention_flop(policy, streams) == 3 * 2 * 2 * prompts * pairs * 32 * 2
    assert (totals.num_rows, totals.num_tokens) == (6, 24)


def test_sides_that_compute_different_things_are_not_compared():
    measure, scaling = load("measure"), load("scaling")
    point = scaling.Point("tiny", prompts=2, group=3, prompt_tokens=8, new_tokens=4)
    sides = {side: [scaling.train(side, point, measure.Place())] for side in scaling.SIDES}
    scaling._must_agree(sides, measure.Place())
    sides["copies"][0]["gradient"] *= 1.001
    with pytest.raises(RuntimeError, match="disagree"):
        scaling._must_agree(sides, measure.Place())


def test_a_doubled_group_s_net_cost_leaves_its_completions_out():
    found = load("scaling").of_doubling([{"t4": 10.0, "t8": 13.0, "s4": 2.0, "s8": 4.0}])
    assert found["plain"]["median"] == pytest.approx(1.3)
    assert found["net"]["median"] == pytest.approx(1.1)
    assert found["increase"]["median"] == pytest.approx(1.5)


def test_end_tokens_leave_half_and_tokens_are_compared_by_place():
    generation = load("generation")
    tokens = [[1, 2, 3, 4], [5, 2, 6, 7]]
    assert generation.ends_for_half(tokens) == (2,)
    assert generation.equal_share([[1, 2], [3]], [[1, 4], [3]]) == pytest.approx(2 / 3)
    assert generation.equal_share([[1, 2]], [[1]]) == 0.5


@pytest.mark.slow
def test_what_is_to_run_on_a_gpu_runs_whole_on_a_cpu(tmp_path):
    """Every part writes its figures, and what only CUDA can do is said to be missing; so no minute on a GPU is spent on a slip."""
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {"command", "commit", "versions", "hardware"} <= found.keys()
    measured = found["measured"]
    assert measured.keys() == load("gpu").LIMITS.keys()
    for part, figures in measured.items():
        failures = {name: one for name, one in figures.items() if isinstance(one, dict) and "failure" in one}
        assert not failures, part
        assert figures["process"].keys() == {"seconds"}, part
        assert len(figures) > 1
    assert measured["machine"]["gpu"] == measured["recompilation"]["flex attention"] == "not on a CPU"
    for size in ("0.6b", "1.7b", "4b"):
        assert measured[size]["training"]["of_matrix_rate"] > 0
        assert measured[size]["decoding"]["tokens_per_second"] > 0
        assert measured[size]["steps"]["steps"] == 2
    assert max(measured["equations"]["float32"]["policy/sampler_gap_max"]) < 1e-3
    assert measured["equal"]["stream beside rows, float32"]["gradient"] < 1e-4
    assert 1e-4 < measured["equal"]["stream beside rows, mixed"]["gradient"] < 0.1


def test_a_part_that_hangs_or_fails_loses_no_figure(tmp_path):
    gpu = load("gpu")
    figures = gpu.Figures(tmp_path / "gpu.json", "part")
    figures.put("first", 1)
    with figures.trying("second"):
        raise ValueError("for this reason")
    given = argparse.Namespace(out=tmp_path, device="cpu", tiny=True)
    gpu.in_process("machine", given, tmp_path / "gpu.json", 0.2)
    measured = json.loads((tmp_path / "gpu.json").read_text())["measured"]
    assert measured["part"]["first"] == 1
    assert measured["part"]["second"]["failure"][-1] == "ValueError: for this reason"
    assert "0 seconds" in measured["machine"]["process"]["exit"]


@pytest.mark.slow
def test_rewards_holds_its_figures_against_targets(tmp_path):
    parts = ["programs", "pairs", "cheating", "failing"]
    command = [sys.executable, "benchmarks/rewards.py", "--quick", "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", *parts], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rewards.json").read_text())["parts"]
    assert found.keys() == set(parts)
    for part in found.values():
        assert {"command", "commit", "versions", "hardware"} <= part.keys()
    assert found["programs"]["sandboxes"].keys() == {"landlock", "bubblewrap"}
    (many, accepted, rejected) = found["pairs"]["figures"]
    assert (many["value"], many["held"]) == (40, False)
    assert accepted["held"]
    assert rejected["held"]
    assert all(figure["held"] for figure in found["failing"]["figures"][:2])
    assert (tmp_path / "rewards.md").read_text() in done.stdout


def test_a_figure_is_held_where_it_reaches_its_target():
    rewards = load("rewards")
    found = [rewards.at_least("a", 59.9, 60), rewards.below("b", 100, 100), rewards.exactly("c", 1, 0)]
    assert [one["held"] for one in found] == [False, False, False]
    found = [rewards.at_least("a", 60, 60), rewards.below("b", 99.9, 100), rewards.exactly("c", 0, 0)]
    assert [one["held"] for one in found] == [True, True, True]
    assert rewards.figures_of({"figures": found})[2] == "| a | 60 | at least 60 | yes |"


def test_rewards_measures_answers():
    rewards = load("rewards")
    found = rewards.measure_answers(argparse.Namespace(quick=True, rounds=1))
    assert found["per_second"].keys() == {"plain", "formulas", "towers"}
    assert found["answers"]["towers"] == 64
    assert found["per_second"]["plain"]["median"] > 0
    assert len(rewards.table_of_answers(found)) == 5
