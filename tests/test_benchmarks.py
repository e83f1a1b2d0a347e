"""What is shown as measured is what the results files hold."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_table_of_the_readme_is_the_results_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks" / "results" / "equations_seeds.json").read_text())
    assert {"command", "commit", "versions", "hardware"} <= results.keys()
    for row in results["seeds"]:
        cells = [f"{row[f'{when}.{name}']:.3f}" for name in ("accuracy", "all_steps") for when in ("before", "after")]
        assert (
            f"| {row['seed']} | {' | '.join(cells)} | {row['after.greedy_accuracy']:.3f} | {row['seconds']} |" in text
        )


def test_the_tables_of_the_measured_page_are_the_results_files():
    page = (ROOT / "docs" / "objectives" / "measured.md").read_text(encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    for name in ("objectives", "objectives_off_policy"):
        found = json.loads((results / f"{name}.json").read_text())
        assert {"command", "commit", "versions", "hardware"} <= found.keys()
        for line in (results / f"{name}.md").read_text().splitlines():
            assert line in page
        assert f"benchmarks/results/{name}.svg" in page


def test_r12_a_moving_and_a_frozen_anchor_were_compared_on_the_same_work():
    methods = json.loads((ROOT / "benchmarks" / "results" / "objectives.json").read_text())["methods"]
    moving, frozen = methods["anchored"], methods["anchored, frozen"]
    assert [row["seed"] for row in moving] == [row["seed"] for row in frozen]
    assert len(moving) >= 3
    for one, other in zip(moving, frozen, strict=True):
        assert one["before"] == other["before"]  # the same start
        assert {"accuracy", "kl_from_start", "one_step_accuracy"} <= one.keys() & other.keys()


def test_r17_what_grpo_trains_is_at_most_0_55_of_what_ppo_trains():
    page = (ROOT / "docs" / "objectives" / "measured.md").read_text(encoding="utf-8")
    sizes = json.loads((ROOT / "benchmarks" / "results" / "grpo_vs_ppo.json").read_text())["sizes"]
    assert len(sizes) >= 2
    for size, found in sizes.items():
        assert found["grpo / ppo"]["trained_state_megabytes"] <= 0.55
        for name in ("trained_state_megabytes", "peak_megabytes", "update_seconds"):
            assert f"{found['grpo / ppo'][name]:.2f}" in page, (size, name)
