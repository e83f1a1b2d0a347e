"""The report shows what a model wrote, and runs none of it."""

import torch

from coterie.recipe import make_recipe
from coterie.runs.report import write_report
from coterie.runs.store import Store
from coterie.types import Completion, Group, Prompt, RewardFailure, Scored

HOSTILE = "<script>alert(1)</script>\n<img src=x onerror=alert(2)>"


def write_run(folder, *, num_steps=3, max_bytes=1e6):
    recipe = make_recipe({"model": "m", "task": {"data": "d"}, "rewards": ["a:b"], "preset": "dapo"})
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    store = Store(folder / "run.db")
    left_out = 0
    for step in range(1, num_steps + 1):
        completions = [Completion([1, 2], torch.tensor([-0.1, -2.0]), torch.ones(2), "stop", HOSTILE) for _ in range(2)]
        groups = [Group(Prompt(p, HOSTILE, [1]), completions) for p in range(3)]
        rewards = torch.tensor([[1.0, 0.0], [1.0, torch.nan], [0.5, 0.5]])
        failures = [RewardFailure("b", 1, 1, HOSTILE)]
        scored = Scored(groups, rewards, {"b": rewards}, failures)
        with store.transaction():
            store.metrics("train", step, {"reward/mean": 0.5, "policy/entropy": float("nan")})
            left_out += store.completions(
                "train", step, scored, torch.zeros(3, 2), lambda tokens: [HOSTILE] * len(tokens), max_bytes=max_bytes
            )
    store.close()
    return left_out


def test_what_a_model_writes_stays_text(tmp_path):
    write_run(tmp_path)
    page = write_report(tmp_path).read_text()
    assert "alert(1)</script>" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page
    for step in (1, 2, 3):
        assert f"<h3>Step {step}</h3>" in page
    assert "abstains" in page


def test_what_is_kept_of_a_step_is_bounded_in_whole_groups(tmp_path):
    left_out = write_run(tmp_path, max_bytes=1500)
    store = Store(tmp_path / "run.db", read_only=True)
    rows = store.read("SELECT step, prompt_number, COUNT(*) AS n FROM completions GROUP BY step, prompt_number")
    assert all(row["n"] == 2 for row in rows)
    assert 0 < left_out == 9 - len(rows)
    assert {row["step"] for row in rows} == {1, 2, 3}  # something of every step
    store.close()


def test_a_resume_removes_what_came_after(tmp_path):
    write_run(tmp_path)
    store = Store(tmp_path / "run.db")
    store.truncate("train", 1, ())
    assert [row["step"] for row in store.read("SELECT DISTINCT step FROM completions")] == [1]
    assert [row["step"] for row in store.read("SELECT DISTINCT step FROM metrics")] == [1]
    store.truncate("cold_start", 5, ("train",))
    assert store.read("SELECT * FROM metrics") == []
    store.close()


def test_r33_signs_of_reward_hacking_stand_above_the_curves_and_not_among_the_events(tmp_path):
    write_run(tmp_path)
    assert "No signs of reward hacking were seen" in write_report(tmp_path).read_text()
    store = Store(tmp_path / "run.db")
    store.event("train", 2, "sign/length_drift", f"longer {HOSTILE}")
    store.event("train", 2, "step_skipped", "not finite")
    store.close()
    page = write_report(tmp_path).read_text()
    place = page.index("<b>length drift</b> from step 2: longer &lt;script&gt;")
    assert place < page.index("<h2>Curves")
    assert "alert(1)</script>" not in page
    events = page[page.index("<h2>Events") :]
    assert "not finite" in events
    assert "length" not in events.partition("<h2>Recipe")[0]
    assert "No signs" not in page
