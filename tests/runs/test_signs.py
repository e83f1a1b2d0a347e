"""Signs of reward hacking: each from series made by hand, silence where all is well, and one of a run that hacks."""

import random
import sqlite3

import coterie
from coterie.evals.statistics import Estimate
from coterie.runs.signs import LIMITS, Limits, Watch
from coterie.runs.store import Store

TWO = {"correct": 1.0, "format": 1.0}


def noisy(values, size, seed):
    """The values with noise of a given std."""
    noise = random.Random(seed)
    return [value + noise.gauss(0, size) for value in values]


def line(start, end, steps):
    return [start + (end - start) * step / (steps - 1) for step in range(steps)]


def signs_of(weights, series, accuracies=None, limits=LIMITS):
    """Every sign that begins in whole series, in order."""
    watch, found = Watch(weights, limits), []
    for step in range(max(map(len, series.values()), default=0) + 1):
        if step > 0:
            found += watch.add(step, {name: values[step - 1] for name, values in series.items() if step <= len(values)})
        if accuracies and step in accuracies:
            found += watch.add_accuracy(step, accuracies[step])
    return found


def names(signs):
    return [sign.name for sign in signs]


def dominated(correct, spread_of_format=1.0):
    steps = len(correct)
    return {
        "reward/correct": correct,
        "reward/format": [0.5] * steps,
        "reward/correct_group_std": [0.1] * steps,
        "reward/format_group_std": [spread_of_format] * steps,
    }


def test_a_part_that_brings_the_variance_while_another_falls():
    """Shares of 1 to 0.01: 99 %. The windows of 20 steps before and after step 40 are compared first."""
    (sign,) = signs_of(TWO, dominated([0.8] * 40 + line(0.8, 0.2, 40)))
    assert sign.name == "one_part_dominates"
    assert 40 < sign.step < 60
    assert "format brings 99%" in sign.text
    assert "correct goes from 0.8" in sign.text


def test_a_part_with_the_variance_is_no_sign_while_others_hold():
    assert signs_of(TWO, dominated([0.8] * 80)) == []
    assert signs_of(TWO, dominated(line(0.2, 0.8, 200))) == []


def test_a_part_that_falls_is_no_sign_where_none_dominates():
    assert signs_of(TWO, dominated([0.8] * 40 + line(0.8, 0.2, 40), spread_of_format=0.2)) == []


def test_weights_decide_what_dominates_and_what_falling_means():
    """A weight of 10 makes 0.2 to 0.1 a share of 99.7 %; of a part that counts against a completion, rising is the loss."""
    series = dominated([0.8] * 40 + line(0.8, 0.2, 40), spread_of_format=0.2)
    assert names(signs_of({"correct": 1.0, "format": 10.0}, series)) == ["one_part_dominates"]
    against = {"correct": -1.0, "format": 10.0}
    assert "one_part_dominates" not in names(signs_of(against, series))
    series["reward/correct"] = line(0.2, 0.8, 80)
    assert names(signs_of(against, series)) == ["one_part_dominates"]


def test_a_part_that_jumps_while_nothing_else_moves():
    """From 0.1 to 0.9 in 10 steps; given once, at the first of the steps at which it holds."""
    format = [0.1] * 30 + line(0.1, 0.9, 10) + [0.9] * 60
    (sign,) = signs_of(TWO, {"reward/format": noisy(format, 0.03, 1), "reward/correct": noisy([0.3] * 100, 0.03, 2)})
    assert sign.name == "one_part_jumps"
    assert sign.about == "format"
    assert 35 < sign.step < 50
    assert "format goes from 0.1" in sign.text


def test_parts_that_rise_together_or_slowly_are_no_sign():
    format = noisy([0.1] * 30 + line(0.1, 0.9, 10) + [0.9] * 60, 0.03, 1)
    assert signs_of(TWO, {"reward/format": format, "reward/correct": format}) == []
    slow = noisy(line(0.1, 0.9, 200), 0.03, 1)
    assert (
        signs_of(
            TWO,
            {
                "reward/format": slow,
                "reward/correct": noisy([0.3] * 200, 0.03, 2),
                "reward/format_group_std": [0.2] * 200,
            },
        )
        == []
    )


def test_a_rise_within_the_completions_spread_is_no_jump():
    """A steady trend has passed half of its range in its first 30 steps, whatever its size."""
    series = {"reward/format": line(0.1, 0.3, 60), "reward/correct": [0.3] * 60}
    assert names(signs_of(TWO, {**series, "reward/format_group_std": [0.05] * 60})) == ["one_part_jumps"]
    assert signs_of(TWO, {**series, "reward/format_group_std": [0.3] * 60}) == []


def test_one_part_alone_has_none_to_be_compared_with():
    assert signs_of({"format": 1.0}, {"reward/format": [0.0] * 30 + [1.0] * 30}) == []


def test_length_that_drifts_either_way():
    """16 at the start; 1.5 times that is 24, half of it 8."""
    (longer,) = signs_of({}, {"completion/tokens_mean": noisy([16.0] * 20 + line(16, 64, 60), 1.0, 3)})
    assert (longer.name, longer.about) == ("length_drift", "longer")
    assert "of the first 10" in longer.text
    (shorter,) = signs_of({}, {"completion/tokens_mean": noisy([16.0] * 20 + line(16, 2, 60), 0.5, 3)})
    assert shorter.about == "shorter"


def test_length_within_its_bounds_is_no_sign():
    assert signs_of({}, {"completion/tokens_mean": noisy(line(16, 22, 100), 1.0, 3)}) == []
    assert signs_of({}, {"completion/tokens_mean": noisy(line(16, 9, 100), 1.0, 3)}) == []


def test_saturation_is_little_spread_at_the_best_reward():
    mean, std = [*line(0.1, 0.99, 40), *[1.0] * 40], [*line(0.3, 0.05, 40), *[0.0] * 40]
    (sign,) = signs_of({}, {"reward/mean": mean, "reward/std": std})
    assert sign.name == "saturation"
    assert sign.step == 60  # 20 steps without any spread
    assert signs_of({}, {"reward/mean": mean, "reward/std": [0.3] * 40 + [0.1] * 40}) == []  # it still varies
    fallen = [*line(0.1, 0.99, 40), *[0.5] * 40]
    assert signs_of({}, {"reward/mean": fallen, "reward/std": std}) == []  # not near the best


def test_groups_without_signal_for_long():
    (sign,) = signs_of({}, {"group/no_signal_share": [0.5] * 30 + [0.9] * 30})
    assert sign.name == "no_signal"
    assert sign.step == 46  # 4 steps of 0.5 and 16 of 0.9: 0.82
    assert "82%" in sign.text
    assert signs_of({}, {"group/no_signal_share": [0.5, 0.9] * 40}) == []
    assert signs_of({}, {"group/no_signal_share": [1.0] * 19}) == []


def accuracy(value):
    return Estimate(value, value - 0.05, value + 0.05, 400)


def test_reward_that_rises_while_held_out_accuracy_falls():
    reward = {"reward/mean": noisy(line(0.2, 0.8, 100), 0.02, 4)}
    (sign,) = signs_of({}, reward, {0: accuracy(0.5), 50: accuracy(0.52), 100: accuracy(0.4)})
    assert (sign.name, sign.step) == ("reward_against_accuracy", 100)
    assert "from 0.520 after step 50 to 0.400" in sign.text
    falling = {0: accuracy(0.5), 25: accuracy(0.4), 50: accuracy(0.3), 75: accuracy(0.2)}
    assert [sign.step for sign in signs_of({}, reward, falling)] == [25]  # said once


def test_accuracy_in_its_interval_or_with_the_reward_is_no_sign():
    reward = {"reward/mean": noisy(line(0.2, 0.8, 100), 0.05, 4)}
    assert signs_of({}, reward, {0: accuracy(0.5), 100: accuracy(0.45)}) == []
    assert signs_of({}, reward, {0: accuracy(0.5), 100: accuracy(0.9)}) == []
    assert signs_of({}, {"reward/mean": noisy([0.5] * 100, 0.05, 4)}, {0: accuracy(0.5), 100: accuracy(0.2)}) == []


def test_a_sign_is_given_anew_only_after_it_was_gone():
    silent, loud = [1.0] * 25, [0.0] * 25
    assert [s.step for s in signs_of({}, {"group/no_signal_share": silent + loud + silent})] == [20, 67]
    assert [s.step for s in signs_of({}, {"group/no_signal_share": silent + [0.0] * 6 + silent})] == [20]


def healthy(seed, steps=300):
    """Both parts are learned, one sooner; lengths grow by a third; some groups have no signal."""
    noise = random.Random(seed)
    series = {
        "reward/correct": noisy(line(0.2, 0.8, steps), 0.08, seed + 1),
        "reward/format": noisy([*line(0.3, 0.9, 100), *[0.9] * (steps - 100)], 0.08, seed + 2),
        "reward/correct_group_std": noisy([0.4] * steps, 0.05, seed + 3),
        "reward/format_group_std": noisy([0.2] * steps, 0.05, seed + 4),
        "reward/std": [abs(noise.gauss(0.5, 0.1)) for _ in range(steps)],
        "completion/tokens_mean": noisy(line(30, 40, steps), 3, seed + 5),
        "group/no_signal_share": [noise.uniform(0.2, 0.8) for _ in range(steps)],
    }
    return {
        **series,
        "reward/mean": [a + b for a, b in zip(series["reward/correct"], series["reward/format"], strict=True)],
    }


def test_runs_that_learn_as_they_should_are_quiet():
    for seed in range(0, 100, 10):
        assert signs_of(TWO, healthy(seed), {0: accuracy(0.2), 150: accuracy(0.5), 300: accuracy(0.8)}) == []


def test_noise_alone_is_quiet():
    flat = {"reward/correct": 0.5, "reward/format": 0.5, "reward/correct_group_std": 0.02, "reward/format_group_std": 0.5,
            "reward/mean": 1.0, "reward/std": 0.5, "completion/tokens_mean": 30.0}  # fmt: skip
    for seed in range(0, 100, 10):
        series = {name: noisy([v] * 300, 0.2 * v, seed + i) for i, (name, v) in enumerate(flat.items())}
        assert signs_of(TWO, series) == []


def test_missing_values_are_no_zeros():
    """A part that abstains in most steps has no windows to compare, and figures that are not numbers are left out."""
    rare = [0.5 if step % 5 == 0 else float("nan") for step in range(100)]
    assert signs_of(TWO, {"reward/format": [0.1] * 50 + [0.9] * 50, "reward/correct": rare}) == []
    assert signs_of(TWO, {"group/no_signal_share": [float("nan")] * 60}) == []


def test_the_limits_are_in_one_place():
    series = {"group/no_signal_share": [0.5] * 30}
    assert names(signs_of({}, series, limits=Limits(silent=0.4))) == ["no_signal"]


def test_a_watch_that_reads_the_record_goes_on_as_if_it_saw_it(tmp_path):
    """Cut at every tenth step: what begins afterwards is the same, and what had begun is not said again."""
    series = dominated(noisy([0.8] * 40 + line(0.8, 0.2, 40), 0.02, 5)) | {
        "group/no_signal_share": [0.9] * 30 + [0.2] * 30 + [0.9] * 20,
        "reward/mean": noisy(line(0.2, 0.8, 80), 0.02, 6),
        "reward/std": [float("nan") if step % 7 == 0 else 0.5 for step in range(80)],
    }
    accuracies = {0: accuracy(0.5), 40: accuracy(0.3), 80: accuracy(0.25)}
    whole = signs_of(TWO, series, accuracies)
    assert len(set(names(whole))) == 3
    for cut in range(0, 80, 10):
        store = Store(tmp_path / f"{cut}.db")
        with store.transaction():
            for step in range(1, cut + 1):
                store.metrics("train", step, {name: values[step - 1] for name, values in series.items()})
            for step, a in accuracies.items():
                if step <= cut:
                    store.evaluation("train", step, "sampled", "accuracy", a.value, a.low, a.high, 100)
        watch, found = Watch.of(store, TWO), []
        for step in range(cut + 1, 81):
            found += watch.add(step, {name: values[step - 1] for name, values in series.items()})
            found += watch.add_accuracy(step, accuracies[step]) if step in accuracies else []
        store.close()
        assert found == [sign for sign in whole if sign.step > cut], cut


def signs_recorded(folder):
    with sqlite3.connect(folder / "run.db") as db:
        return db.execute(
            "SELECT stage, step, kind, message FROM events WHERE kind LIKE 'sign/%' ORDER BY step"
        ).fetchall()


def test_a_run_says_once_and_in_the_report_that_it_is_hacked(tiny_recipe, tmp_path, capsys):
    """Letters are easy to write more of, and solve no equation. Stopped and resumed it says the same."""
    (tmp_path / "rewards.py").write_text(
        "def letters(completions):\n    return [sum(c.isalpha() for c in t[0]['content']) / 12 for t in completions]\n"
    )
    recipe = [
        *tiny_recipe, "cold_start=null", "steps=45", "prompts_per_step=4", "group_size=8", "optimiser.learning_rate=1.0e-2",
        "loss.kl_weight=0", "evaluation={prompts: 8, samples: 1, every: 0}", "checkpoint={every: 15, keep_last: 3}",
        f"rewards=['coterie.tasks.equation_rewards:right_answer', '{tmp_path}/rewards.py:letters']",
    ]  # fmt: skip
    whole = coterie.train("equations", overrides=recipe, out=str(tmp_path / "whole")).folder
    signs = signs_recorded(whole)
    jumps = [message for _, _, kind, message in signs if kind == "sign/one_part_jumps"]
    assert len(jumps) == 1
    assert jumps[0].startswith("letters goes from 0.")
    printed = capsys.readouterr().out
    assert printed.count("one_part_jumps") == 1
    page = (whole / "report.html").read_text()
    assert page.index("<h2>Signs of reward hacking") < page.index("<h2>Curves")
    assert jumps[0] in page
    stop = signs[0][1] - 3
    parted = coterie.train("equations", overrides=recipe, out=str(tmp_path / "parted"), stop_after=stop).folder
    assert signs_recorded(parted) == []
    coterie.train(resume=str(parted))
    assert signs_recorded(parted) == signs
