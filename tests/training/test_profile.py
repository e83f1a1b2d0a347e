"""`--profile` says where a step goes, and changes nothing of the run."""

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass

import pytest
import small_runs
import torch
from conftest import some_quick
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

import coterie
from coterie import sections
from coterie.cli import app
from coterie.sections import Stopwatch, section, timing
from coterie.training.profile import Profiler, _Marks, peak_memory, plan, slowest_operators

LETTERS = "def letters(completions, **columns):\n    return [float(len(set(c[0]['content']))) for c in completions]\n"
METHODS = {
    "grpo": ["preset=grpo"],
    "ppo": ["preset=ppo", "value.learning_rate=1.0e-3"],
    "dpo": ["preset=dpo", "group_size=", "rewards="],
    "reward_model": ["preset=reward_model", "group_size=", "sampling=", "rewards=", "evaluation={prompts: 50, every: 3}"],
    "sft": ["preset=sft", "cold_start=", "group_size=", "rewards=", "evaluation={prompts: 8, samples: 1}"],
}  # fmt: skip
TRAIN = {"train/forward", "train/backward", "train/optimiser", "record", "checkpoint", "other"}
SAMPLE = {"sample/other", "sample/prefill", "sample/decode", "score", "evaluate", "reference"}
SECTIONS = {
    "grpo": TRAIN | SAMPLE,
    "ppo": TRAIN | SAMPLE | {"value"},
    "dpo": TRAIN | {"reference", "evaluate"},
    "reward_model": TRAIN | {"evaluate"},
    "sft": TRAIN,
}


@pytest.fixture
def train(tiny_recipe, tmp_path):
    """Train the tiny recipe for eight steps and say where the run is."""
    (tmp_path / "letters.py").write_text(LETTERS)

    def run(name, *overrides, **options):
        given = [*tiny_recipe, f"rewards=['{tmp_path}/letters.py:letters']", "loss=", "steps=8", "cold_start.steps=8"]
        return coterie.train("equations", overrides=[*given, *overrides], out=str(tmp_path / name), **options).folder

    return run


def stages(folder):
    return json.loads((folder / "profile.json").read_text())["stages"]


def seconds_of(stage):
    return {one["name"]: one["seconds"] for one in stage["sections"]}


def assert_adds_up(stage):
    assert sum(seconds_of(stage).values()) == pytest.approx(stage["step_seconds"], rel=1e-9)
    assert sum(one["share"] for one in stage["sections"]) == pytest.approx(1, rel=1e-9)
    assert all(one["seconds"] >= 0 for one in stage["sections"])


def results(folder):
    """The weights, and everything in run.db that does not depend on the clock."""
    with sqlite3.connect(folder / "run.db") as db:
        queries = (
            "SELECT * FROM metrics WHERE name NOT LIKE 'time/%' ORDER BY stage, step, name",
            "SELECT * FROM completions ORDER BY stage, step, prompt_number, completion_number",
            "SELECT * FROM evaluations ORDER BY stage, step, mode, name",
        )
        return load_file(folder / "model" / "model.safetensors"), [db.execute(query).fetchall() for query in queries]


@pytest.mark.parametrize("method", some_quick(METHODS, "grpo", "dpo"))
def test_a_profiled_run_is_the_same_run_and_its_sections_add_up(train, method, capsys):
    plain = train("plain", *METHODS[method])
    assert not (plain / "profile.json").exists()
    assert "Where a step goes" not in capsys.readouterr().out + (plain / "report.html").read_text()
    profiled = train("profiled", *METHODS[method], profile=True)
    (weights, recorded), (same_weights, same_recorded) = results(plain), results(profiled)
    assert weights.keys() == same_weights.keys()
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    assert recorded == same_recorded

    found = stages(profiled)
    assert list(found) == (["train"] if method == "sft" else ["cold_start", "train"])
    assert set(seconds_of(found["train"])) == SECTIONS[method]
    for name, stage in found.items():
        assert_adds_up(stage)
        assert (stage["steps"], stage["traced_step"]) == ([3, 4, 5], 6), name
        assert all(seconds > 0 for seconds in stage["bare_step_seconds"].values())
        peaks = {one["name"]: one["peak_bytes"] for one in stage["sections"]}
        assert peaks["train/backward"] > 0
        assert all(peak is not None for peak in peaks.values())  # a checkpoint falls on step 6 too
        own = [operator["seconds"] for operator in stage["operators"]]
        assert len(own) == 12
        assert own == sorted(own, reverse=True)
        assert own[-1] > 0
        assert any(operator["name"] in ("aten::mm", "aten::addmm") for operator in stage["operators"])

    printed, page = capsys.readouterr().out, (profiled / "report.html").read_text()
    assert "Where a step goes" in printed
    assert page.count("<h2>Where a step goes</h2>") == 1
    for text in (*SECTIONS[method], found["train"]["operators"][0]["name"]):
        assert f"<td>{text}</td>" in page
    assert all(f"  {name} " in printed for name in SECTIONS[method])


def test_the_sections_hold_the_step_that_the_trainer_times(train):
    """time/step_seconds is read by another clock, from the draw to the new weights."""
    folder = train("run", "preset=grpo", "evaluation.every=0", "checkpoint.every=100", profile=True)
    with sqlite3.connect(folder / "run.db") as db:
        query = "SELECT name, AVG(value) FROM metrics WHERE stage = 'train' AND step IN (3, 4, 5) GROUP BY name"
        timed = dict(db.execute(query).fetchall())
    stage = stages(folder)["train"]
    seconds = seconds_of(stage)
    assert timed["time/step_seconds"] <= stage["step_seconds"]
    sampled = sum(value for name, value in seconds.items() if name.startswith("sample/"))
    assert 0.8 * timed["time/sample_seconds"] < sampled <= timed["time/sample_seconds"]
    assert seconds["train/forward"] + seconds["train/backward"] + seconds["reference"] < timed["time/train_seconds"]
    assert "checkpoint" not in seconds


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_short_runs_are_profiled_as_far_as_they_go(train, steps):
    folder = train("run", "preset=grpo", f"steps={steps}", "cold_start.steps=1", profile=True)
    for stage, last in (("cold_start", 1), ("train", steps)):
        found = stages(folder)[stage]
        assert_adds_up(found)
        assert found["traced_step"] == last
        assert found["operators"]
        assert last not in found["steps"] or last == 1
    assert "<h2>Where a step goes</h2>" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_stopped_and_resumed_runs_profile_what_they_see(train, capsys):
    whole = train("whole", "preset=grpo")
    folder = train("run", "preset=grpo", profile=True, stop_after=3)
    assert "Where a step goes" in capsys.readouterr().out
    first = stages(folder)
    assert (first["train"]["steps"], first["train"]["traced_step"]) == ([2], 3)
    coterie.train(resume=str(folder), profile=True)
    second = stages(folder)
    assert second["cold_start"] == first["cold_start"]
    assert (second["train"]["steps"], second["train"]["traced_step"]) == ([6, 7], 8)
    assert_adds_up(second["train"])
    weights, same_weights = results(whole)[0], results(folder)[0]
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)


def test_a_traced_step_that_fails_leaves_nothing_behind(train, monkeypatch):
    small_runs.plan("before_step:6:raise", monkeypatch.setattr)
    with pytest.raises(RuntimeError, match="on purpose") as held:  # which keeps the frames of the failed step alive
        train("run", "preset=grpo", "cold_start.steps=5", profile=True)
    assert held.value
    assert not torch.autograd._profiler_enabled()
    assert sections._running.get() is None
    folder = train("other", "preset=grpo", profile=True)
    assert_adds_up(stages(folder)["train"])
    died = folder.parent / "run"
    assert (stages(died)["train"]["steps"], stages(died)["train"]["traced_step"]) == ([3, 4, 5], None)
    coterie.train(resume=str(died), profile=True)
    assert stages(died)["train"]["traced_step"] == 8


def test_the_command_profiles(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    settings = [word for override in [*tiny_recipe, "steps=2"] for word in ("--set", override)]
    done = CliRunner().invoke(app, ["train", "equations", *settings, "--out", str(tmp_path / "run"), "--profile"])
    assert done.exit_code == 0, done.output
    assert "Where a step goes" in done.output
    assert_adds_up(stages(tmp_path / "run")["train"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_only_timed_sections_wait_for_the_device(tmp_path, monkeypatch, device):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    profiler = Profiler(tmp_path, torch.device(device))
    profiler.begin_stage(1, 20)
    counts = {}
    for step in range(1, 6):
        waits.clear()
        with profiler.step("train", step), section("score"):
            pass
        counts[step] = len(waits)
    waited = 4 if device == "cuda" else 0  # at the beginning, before and after the section, at the end
    assert counts == {1: 0, 2: 0, 3: waited, 4: waited, 5: waited}


def test_products_are_counted_where_they_are_computed(train):
    """Of each token that is trained: twice the weights of its products forward, twice that backward."""
    folder = train("run", "preset=grpo", "evaluation.every=0", "sampling.max_new_tokens=4", profile=True)
    seconds = {one["name"]: one["product_seconds"] for one in stages(folder)["train"]["sections"]}
    assert seconds["train/backward"] == pytest.approx(2 * seconds["train/forward"])
    assert seconds["sample/prefill"] > 0
    assert seconds["sample/decode"] > 0
    assert seconds["score"] is None
    assert json.loads((folder / "profile.json").read_text())["products_per_second"] > 0


def test_which_steps_are_watched():
    assert plan(11, 100) == {
        12: "untouched", 13: "timed", 14: "timed", 15: "timed", 16: "traced", 17: "untouched",
    }  # fmt: skip
    assert plan(1, 4) == {2: "untouched", 3: "timed", 4: "traced"}
    assert plan(1, 3) == {2: "timed", 3: "traced"}
    assert plan(1, 2) == {1: "timed", 2: "traced"}
    assert plan(1, 1) == {1: "traced"}
    assert plan(5, 4) == {}


def traced(body):
    """The profiler's own result of a body that is cut into sections, and its events."""
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace,
        closing(_Marks(waits=False, traced=True)) as marks,
        timing(Stopwatch(marks.turn)),
    ):
        body()
    return trace, trace.profiler.kineto_results.events()


def test_the_peak_of_a_section_is_what_is_held_in_it_at_most():
    megabyte = 2**18  # floats

    def body():
        with section("score"):
            kept = torch.empty(3 * megabyte)
            passing = torch.empty(5 * megabyte)
            del passing
        with section("train/forward"):
            more = torch.empty(megabyte)
        with section("train/backward"):
            del kept
            last = torch.empty(megabyte)
        del more, last

    peaks = peak_memory(traced(body)[1], "cpu")
    assert peaks == {"other": 4 * 2**20, "score": 8 * 2**20, "train/forward": 4 * 2**20, "train/backward": 4 * 2**20}
    assert set(peak_memory(traced(body)[1], "cuda").values()) == {0}


def test_the_operators_are_those_of_torchs_own_table():
    weight = torch.nn.Parameter(torch.randn(64, 64))

    def body():
        with section("train/forward"):
            loss = (torch.randn(64, 64) @ weight).relu().softmax(1).square().sum()
        with section("train/backward"):
            loss.backward()

    trace, _ = traced(body)
    found = slowest_operators(trace.key_averages(), 12)
    table = {row.key: row for row in trace.key_averages() if not row.key.startswith("coterie/")}
    by_time = sorted(table.values(), key=lambda row: row.self_cpu_time_total, reverse=True)
    assert [operator["name"] for operator in found] == [row.key for row in by_time[:12]]
    for operator in found:
        row = table[operator["name"]]
        assert operator["calls"] == row.count
        assert operator["seconds"] == pytest.approx(row.self_cpu_time_total / 1e6, abs=1e-8)
        assert operator["device_seconds"] is None


@dataclass(frozen=True)
class Row:
    """As torch gives them of a GPU."""

    key: str
    self_cpu_time_total: float
    self_device_time_total: float = 0
    device_type: object = torch.profiler.DeviceType.CPU
    is_user_annotation: bool = False
    is_async: bool = False
    count: int = 1


def test_operators_that_launch_work_for_a_gpu_are_in_the_order_of_its_time():
    rows = [
        Row("coterie/train/forward", 90, 3000, is_user_annotation=True),
        Row("coterie/train/forward", 0, 3000, device_type=torch.profiler.DeviceType.CUDA),
        Row("gemm", 0, 3000, device_type=torch.profiler.DeviceType.CUDA),
        Row("aten::matmul", 20),
        Row("aten::mm", 15, 3000),
        Row("aten::add", 25),
        Row("[memory]", 99),
    ]
    assert slowest_operators(rows, 3) == [
        {"name": "aten::mm", "calls": 1, "seconds": pytest.approx(15e-6), "device_seconds": pytest.approx(3e-3)},
        {"name": "aten::add", "calls": 1, "seconds": pytest.approx(25e-6), "device_seconds": 0},
        {"name": "aten::matmul", "calls": 1, "seconds": pytest.approx(20e-6), "device_seconds": 0},
    ]


@dataclass(frozen=True)
class Event:
    """As torch gives them of a GPU: what begins, or is allocated."""

    shown: str
    device: str
    start: int
    size: int = 0

    def __getattr__(self, name):
        device = getattr(torch.profiler.DeviceType, self.device)
        return lambda: {"name": self.shown, "start_ns": self.start, "nbytes": self.size, "device_type": device}[name]


def test_memory_of_a_gpu_belongs_to_the_section_under_way():
    events = [
        Event("coterie/other", "CPU", 0),
        Event("coterie/train/forward", "CPU", 10),
        Event("coterie/train/forward", "CUDA", 10),
        Event("[memory]", "CUDA", 31, size=512),
        Event("[memory]", "CPU", 32, size=64),
    ]
    assert peak_memory(events, "cuda") == {"other": 0, "train/forward": 512}
