"""The report shows what a model wrote, and runs none of it."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from coterie.errors import UserError
from coterie.recipe import make_recipe
from coterie.runs.reader import Reader
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


def write_summary(folder, **example):
    of_text = {"prompt": HOSTILE, "before": "x = 2", "after": "x = 3"}
    summary = {"before": {}, "after": {}, "seed": 0, "seconds": 1.0, "examples": [{**of_text, **example}]}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_examples_are_marked_right_or_wrong_with_their_rewards(tmp_path):
    write_run(tmp_path)
    write_summary(tmp_path, before_reward=0.25, before_correct=0, after_reward=9.0, after_correct=1)
    page = write_report(tmp_path).read_text()
    assert "<figcaption class='wrong'>before: wrong, reward 0.25</figcaption>" in page
    assert "<figcaption class='right'>after: right, reward 9.00</figcaption>" in page
    write_summary(tmp_path)  # of a run that recorded neither
    assert "<figcaption class=''>before</figcaption>" in write_report(tmp_path).read_text()


def record_group(store, step, rewards, texts):
    row = {
        "prompt": f"prompt of step {step}",
        "tokens": "[1]",
        "pieces": '["x"]',
        "sampler_logprobs": "[-0.1]",
        "reward_parts": "{}",
    }
    for number, (reward, text) in enumerate(zip(rewards, texts, strict=True)):
        columns = {"stage": "train", "step": step, "prompt_number": 0, "completion_number": number, "text": text, "advantage": 0.0,
                   "reward": reward, "ended": "stop", **row}  # fmt: skip
        with sqlite3.connect(store) as db:
            db.execute(
                f"INSERT INTO completions ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
                [*columns.values()],
            )


def test_shown_groups_differ_and_equal_completions_are_one_card(tmp_path):
    write_run(tmp_path, num_steps=0)
    for step in range(1, 41):
        told_apart = step in (1, 15, 33)
        record_group(
            tmp_path / "run.db", step, [1.0, 0.0 if told_apart else 1.0, 1.0], ["a", "b" if told_apart else "a", "a"]
        )
    page = write_report(tmp_path).read_text()
    assert [step for step in range(1, 41) if f"<h3>Step {step}</h3>" in page] == [1, 15, 33]
    assert page.count("class='card ") == 3 * 2
    assert page.count("· 2 times") == 3


def test_curves_have_plain_numbers_and_a_panel_for_each_part(tmp_path):
    write_run(tmp_path)
    store = Store(tmp_path / "run.db")
    for step in (1, 2, 3):
        store.metrics(
            "train", step, {"reward/b": 0.5, "loss/total": -1e-8 * step, "optimiser/learning_rate": 1e-6 * step}
        )
    store.close()
    page = write_report(tmp_path).read_text()
    charts = {layout["title"]["text"]: layout for layout in layouts(page)}
    assert {"Reward, the weighted sum", "Each part of the reward, unweighted", "Loss", "Learning rate"} <= charts.keys()
    assert all(chart["yaxis"]["exponentformat"] == "none" for chart in charts.values())
    assert charts["Loss"]["yaxis"]["range"] == [-0.001, 0.001]  # rounding is not blown up to a curve
    assert charts["Learning rate"]["yaxis"]["range"] == pytest.approx(
        [0, 1.1 * 3e-6]
    )  # one that stays the same is told from 0


def layouts(page):
    for chart in page.split("<div class='chart'>")[1:]:
        yield json.JSONDecoder().raw_decode(chart[chart.index('{"template"') :])[0]


def test_what_is_kept_of_a_step_is_bounded_in_whole_groups(tmp_path):
    left_out = write_run(tmp_path, max_bytes=1500)
    store = Reader(tmp_path / "run.db")
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


def test_signs_of_hacking_stand_above_curves_and_in_no_events(tmp_path):
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


SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>'\" onmouseover='alert(3)"


def write_whole_run(folder):
    """With everything that the report reads."""
    write_run(folder)
    figures = {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6]}
    summary = {"before": figures, "after": figures, "seed": 1, "seconds": 2.0,
               "examples": [{"prompt": "p", "before": "b", "after": "a"}]}  # fmt: skip
    section = {"name": "sample", "seconds": 1.0, "share": 1.0, "calls": 2.0, "peak_bytes": 5}
    stage = {"steps": [1, 2], "step_seconds": 1.0, "bare_step_seconds": {"timed": 1.0, "traced": 2.0}, "traced_step": 2,
             "sections": [section], "operators": [{"name": "mm", "calls": 1, "seconds": 1.0, "device_seconds": None}]}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "profile.json").write_text(json.dumps({"stages": {"train": stage}}))
    store = Store(folder / "run.db")
    store.evaluation("train", 1, "sampled", "accuracy", 0.5, 0.4, 0.6, 9)
    store.event("train", 1, "sign/length_drift", "longer")
    store.event("train", 1, "limit", "much")
    store.close()


def places_in(value, path=()):
    """The path to every key and every plain value in JSON."""
    for name, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield ("key", *path, name)
        yield from places_in(inner, (*path, name))
    if not isinstance(value, dict | list):
        yield ("value", *path)


def changed(value, kind, *path):
    value = json.loads(json.dumps(value))
    *before, last = path
    owner = value
    for name in before:
        owner = owner[name]
    if kind == "value":
        owner[last] = SCRIPT
    elif isinstance(owner, dict):
        owner[SCRIPT] = owner.pop(last)
    return value


class Page(HTMLParser):
    """What a browser would take for elements, attributes and scripts."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.scripts = set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        if self.lasttag == "script":
            self.scripts.append(data.strip())


def assert_harmless(folder):
    """The report is refused in a sentence, or nothing in it is a part of the page."""
    (folder / "report.html").unlink(missing_ok=True)
    try:
        page = Page(write_report(folder).read_text("utf-8"))
    except UserError as error:
        said = str(error)
        assert "no run writes" in said
        return
    assert "img" not in page.tags
    assert not [name for name in page.attributes if name.startswith("on")]
    assert not [script for script in page.scripts if script.startswith("alert")]


@pytest.fixture
def quick_plotly(monkeypatch):
    """The page without the library itself, which is 4 MB."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")


@pytest.mark.slow
def test_nothing_in_a_sent_runs_json_is_a_part_of_the_page(tmp_path, quick_plotly):
    write_whole_run(tmp_path)
    write_report(tmp_path)
    for name in ("summary.json", "profile.json"):
        whole = json.loads((tmp_path / name).read_text())
        for place in places_in(whole):
            (tmp_path / name).write_text(json.dumps(changed(whole, *place)))
            assert_harmless(tmp_path)
        for text in ("[]", "null", "[" * 100_000, "{", '{"after": 1}', '{"stages": []}'):
            (tmp_path / name).write_text(text)
            assert_harmless(tmp_path)
        (tmp_path / name).write_text(json.dumps(whole))


@pytest.mark.slow
def test_nothing_in_a_sent_runs_database_is_a_part_of_the_page(tmp_path, quick_plotly):
    """Whatever its tables say that their columns hold."""
    write_whole_run(tmp_path)
    whole = (tmp_path / "run.db").read_bytes()
    for table in ("metrics", "completions", "evaluations", "events"):
        (tmp_path / "run.db").write_bytes(whole)
        with contextlib.closing(sqlite3.connect(tmp_path / "run.db")) as db:
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        for column in columns:
            for given in (SCRIPT, json.dumps([SCRIPT, SCRIPT]), json.dumps({SCRIPT: 1}), None):
                (tmp_path / "run.db").write_bytes(whole)
                with contextlib.closing(sqlite3.connect(tmp_path / "run.db")) as db:
                    rows = db.execute(f"SELECT * FROM {table}").fetchall()
                    db.execute(f"DROP TABLE {table}")
                    db.execute(f"CREATE TABLE {table} ({', '.join(columns)})")  # of no type, without keys
                    db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", rows)
                    db.execute(f"UPDATE {table} SET {column} = ?", (given,))
                    db.commit()
                assert_harmless(tmp_path)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER theirs AFTER INSERT ON events BEGIN UPDATE events SET step = 'x'; END",
        "CREATE VIEW theirs AS SELECT 1",
        "ALTER TABLE metrics RENAME TO kept; CREATE VIEW metrics AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT 'train' AS stage, i AS step, 'x' AS name, i AS value FROM n",
        "CREATE VIRTUAL TABLE theirs USING fts5(text)",
    ],
)
@pytest.mark.parametrize("opened", [Reader, Store])
def test_a_database_that_acts_when_it_is_used_is_refused(tmp_path, statement, opened):
    write_run(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "run.db")) as db:
        db.executescript(statement)
    with pytest.raises(UserError, match="which no run writes"):
        opened(tmp_path / "run.db")


def test_the_page_asks_the_network_for_nothing_and_shows_no_key(tmp_path, monkeypatch):
    write_whole_run(tmp_path)
    monkeypatch.setenv("MY_TOKEN", HOSTILE[:20])
    page = write_report(tmp_path).read_text()
    assert "default-src 'none'" in page
    assert "script-src 'sha256-" in page
    assert "***" in page
    assert "&lt;script&gt;alert(1)" not in page


def test_the_steps_are_looked_up_and_not_searched_for(tmp_path):
    """A run's completions may be gigabytes: what is read for that does not grow with their number in a step."""
    counts = []
    for num_rows in (1, 500):
        store = Store(tmp_path / f"{num_rows}.db")
        assert store.steps_with_completions() == []
        rows = [("train", step, 0, row, "p", "t" * 100, "[]", "[]", "[]", 0.0, 1.0, "{}", "stop", None)
                for step in (1, 2, 3, 7) for row in range(num_rows)]  # fmt: skip
        with store.transaction():
            store._insert("completions", rows)
        work = []
        store._db.set_progress_handler(lambda work=work: work.append(1) and 0, 1)
        assert store.steps_with_completions() == [1, 2, 3, 7]
        counts.append(len(work))
        store.close()
    assert counts[1] <= counts[0] + 20


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def page_in_a_browser(path):
    """The document after its scripts have run, and what the console says."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=9000",
               f"--user-data-dir={path.parent / 'browser'}", "--dump-dom", path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
def test_a_browser_draws_every_chart_and_runs_nothing_else(tmp_path):
    write_whole_run(tmp_path)
    path = write_report(tmp_path)
    document, console = page_in_a_browser(path)
    charts = document.count('<script type="application/json">')
    assert charts > 3
    assert document.count("main-svg") >= charts
    assert "Content Security Policy" not in console
    theirs = "<script>document.title = 'theirs'</script><img src=x onerror=\"document.title = 'theirs'\"></main>"
    path.write_text(path.read_text().replace("</main>", theirs))
    document, console = page_in_a_browser(path)
    assert "<title>theirs" not in document
    assert document.count("main-svg") >= charts
