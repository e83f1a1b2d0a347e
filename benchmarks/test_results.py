"""What the pages show as measured is what the committed results files hold, and those say how it was measured.

`make release` runs this: nothing here computes anything anew, and only a new measurement or another page can change what it finds.
"""

import json
from pathlib import Path

import pytest
from faults import EXPERIMENTS
from memory import held_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def read(name):
    """A results file, or each of its parts where they were measured apart, with what it was measured by."""
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    for measured in found["parts"].values() if "parts" in found else [found]:
        assert {"command", "commit", "versions", "hardware"} <= measured.keys(), name
        assert "--quick" not in measured["command"], name
    return found


def page(*names):
    return "".join((ROOT / name).read_text(encoding="utf-8") for name in names)


def missing(name, text):
    """The lines of a results file's tables that a page does not show."""
    lines = (RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line not in text and not line.startswith("<!--")]


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("*.json")))
def test_every_file_says_how_it_was_measured(name):
    read(name)


@pytest.mark.parametrize(
    ("name", "pages"),
    [
        ("objectives", ["docs/objectives/measured.md"]),
        ("objectives_off_policy", ["docs/objectives/measured.md"]),
        ("versus_trl", ["docs/performance.md"]),
        ("versus_trl_real", ["docs/performance.md"]),
        ("scaling", ["docs/performance.md"]),
        ("roofline", ["docs/performance.md"]),
        ("generation", ["docs/performance.md"]),
        ("faults", ["docs/reliability.md"]),
        ("rewards", ["docs/rewards.md", "docs/sandbox.md"]),
    ],
)
def test_the_tables_of_the_pages_are_those_measured(name, pages):
    assert missing(name, page(*pages)) == []


def test_the_table_of_the_readme_is_the_one_measured():
    text = page("README.md")
    for row in read("equations_seeds")["seeds"]:
        cells = [f"{row[f'{when}.{name}']:.3f}" for name in ("accuracy", "all_steps") for when in ("before", "after")]
        assert f"| {' | '.join([str(row['seed']), *cells])} |" in text


def test_the_table_of_what_is_held_is_the_one_computed():
    text = page("docs/memory.md")
    assert [line for line in held_table() if line not in text] == []


@pytest.mark.parametrize("name", ["objectives", "objectives_off_policy"])
def test_the_figures_of_the_measured_page_are_there(name):
    assert f"benchmarks/results/{name}.svg" in page("docs/objectives/measured.md")
    assert (RESULTS / f"{name}.svg").is_file()


def test_moving_and_frozen_anchors_were_compared_on_equal_work():
    methods = read("objectives")["methods"]
    moving, frozen = methods["anchored"], methods["anchored, frozen"]
    assert [row["seed"] for row in moving] == [row["seed"] for row in frozen]
    assert len(moving) >= 3
    for one, other in zip(moving, frozen, strict=True):
        assert one["before"] == other["before"]  # the same start
        assert {"accuracy", "kl_from_start", "one_step_accuracy"} <= one.keys() & other.keys()


def test_what_grpo_trains_is_at_most_0_55_of_what_ppo_trains():
    text = page("docs/objectives/measured.md")
    sizes = read("grpo_vs_ppo")["sizes"]
    assert len(sizes) >= 2
    for size, found in sizes.items():
        assert found["grpo / ppo"]["trained_state_megabytes"] <= 0.55
        for name in ("trained_state_megabytes", "peak_megabytes", "update_seconds"):
            assert f"{found['grpo / ppo'][name]:.2f}" in text, (size, name)


def test_both_trainers_took_the_same_steps_and_learned_alike():
    found = read("versus_trl")["work"]
    assert found.keys() == {"short", "long prompt", "ragged"}
    for work, result in found.items():
        for part in (slice(0, 8), slice(None), slice(-10, None)):  # one step's mean moves by 0.03 with its prompts
            of_side = [
                sum(sum(of_seed[side]["rewards"][part]) for of_seed in result["seeds"])
                / sum(len(of_seed[side]["rewards"][part]) for of_seed in result["seeds"])
                for side in ("trl", "coterie")
            ]
            assert of_side[0] == pytest.approx(of_side[1], abs=0.03), (work, part)
        lengths = [
            sum(of_seed[side]["tokens_per_completion"] for of_seed in result["seeds"]) for side in ("trl", "coterie")
        ]
        assert lengths[0] == pytest.approx(lengths[1], rel=0.1), work


def test_both_trainers_did_the_same_work_on_the_real_model():
    compared = [part["result"] for part in read("versus_trl_real")["parts"].values() if "result" in part]
    assert compared
    for result in compared:
        for what in ("silent_share", "tokens_per_completion"):
            assert result["trl"][what] == pytest.approx(result["coterie"][what], rel=0.01)


def test_what_rewards_withstand_held_as_root_and_as_a_plain_user():
    parts = read("rewards")["parts"]
    assert parts.keys() == {"programs", "answers", "pairs", "hostile", "cheating", "failing"}
    assert all(figure["held"] for part in parts.values() for figure in part["figures"])
    users = ("root", "a plain user")
    assert parts["hostile"]["runs"].keys() == {f"{box}, {user}" for box in ("landlock", "bubblewrap") for user in users}


def test_every_experiment_with_faults_held():
    experiments = read("faults")["experiments"]
    assert list(experiments) == list(EXPERIMENTS)
    assert all(one["held"] for one in experiments.values())


def test_what_saving_costs_is_what_was_measured():
    text, saving = page("docs/reliability.md"), read("saving")
    assert f"{saving['share_on_average']:.2%}" in text
    assert f"{saving['share_of_its_step']:.1%}" in text
    assert saving["held"] == (saving["share_on_average"] <= 0.03)
