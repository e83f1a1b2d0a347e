"""The pages that are made from the code are what the code is, and the site builds."""

import importlib.util
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import some_quick

import coterie
from coterie.algorithms.objectives import OBJECTIVES
from coterie.recipe import load_recipe
from coterie.recipe.presets import PRESETS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)

REWARDS = """
def letters(completions, **columns):
    return [sum(c.isalpha() for c in completion[0]["content"]) for completion in completions]
"""
RUNS = {  # name: (method, overrides); each writes what others do not
    "grpo": ("grpo", ["preset=grpo"]),
    "dapo": ("grpo", ["preset=dapo", "record={max_megabytes_per_step: 0.0001}"]),
    "rloo": ("grpo", ["preset=rloo", "correction={kind: truncate}"]),
    "adaptive": ("grpo", ["preset=grpo", "kl={target: 0.001}", "entropy={weight: 0.01, target: 5.0}", "loss={kl_weight: 0.1}"]),
    "ppo": ("ppo", ["preset=ppo"]),
    "dpo": ("dpo", ["preset=dpo", "group_size=", "rewards="]),
    "reward_model": ("reward_model", ["preset=reward_model", "group_size=", "sampling=", "rewards=", "evaluation={prompts: 8, every: 2}"]),
    "sft": ("sft", ["preset=sft", "cold_start=", "group_size=", "rewards=", "evaluation={prompts: 8, samples: 1}"]),
}  # fmt: skip


@pytest.fixture
def train(tiny_recipe, tmp_path):
    """Train the tiny recipe for two steps, and say where the run is."""
    (tmp_path / "letters.py").write_text(REWARDS)
    rewards = f"rewards=['{tmp_path}/letters.py:letters']"

    def run(name, *overrides):
        given = [*tiny_recipe, "cold_start=", rewards, "loss=", "steps=2", *overrides]
        return coterie.train("equations", overrides=given, out=str(tmp_path / name)).folder

    return run


def rows(page, columns):
    """The cells of a page's tables that have these first columns, code marks left out."""
    found = re.findall(r"^\| `([^`|]+)` \|(.*)\|$", page, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split(" | ")][: columns - 1] for name, rest in found}


@pytest.mark.parametrize("name", generate.PAGES)
def test_the_page_is_what_the_code_is(name):
    assert (DOCS / name).read_text(encoding="utf-8") == generate.PAGES[name](), "python docs/generate.py writes it anew"


@pytest.mark.parametrize("name", some_quick(RUNS, "grpo", "ppo"))
def test_every_metric_of_a_run_is_on_the_page_for_its_method(name, train):
    """Names, and who writes them."""
    method, overrides = RUNS[name]
    listed = rows((DOCS / "metrics.md").read_text(encoding="utf-8"), 4)
    with sqlite3.connect(train(name, *overrides) / "run.db") as db:
        written = {found for (found,) in db.execute("SELECT DISTINCT name FROM metrics")}
    assert {"optimiser/learning_rate", "loss/total"} <= written
    for metric in written:
        metric = metric.replace("reward/letters", "reward/NAME")
        assert metric in listed, metric
        assert method in listed[metric][2].split(", "), f"{metric} of {method}"


def test_no_metric_is_on_the_page_that_no_code_writes():
    listed = rows((DOCS / "metrics.md").read_text(encoding="utf-8"), 4).keys()
    assert listed - generate.NAMED == generate.metrics_in_code()


def test_every_preset_and_objective_is_on_its_page():
    page = (DOCS / "presets.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (\S+)$", page, re.MULTILINE) == list(PRESETS)
    assert re.findall(r"^\| \[`(\w+)`\]", page, re.MULTILINE) == list(OBJECTIVES)
    for block in re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        values = yaml.safe_load(block)
        assert PRESETS[values.pop("preset")] == values


def test_the_lines_of_pandas_read_a_run(train, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pandas")
    (code,) = re.findall(r"^```python\n(.*?)^```$", (DOCS / "database.md").read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    train("runs/equations", "preset=grpo")
    exec(code, {})
    assert "reward/mean" in capsys.readouterr().out


@pytest.mark.parametrize(("page", "model"), [("own_model", "Qwen/Qwen3-0.6B"), ("first_real_model", "smollm2")])
def test_the_recipe_for_a_pretrained_model_is_whole(tmp_path, page, model):
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "questions.jsonl").write_text('{"question": "2 + 2?", "answer": "4"}\n')
    (tmp_path / "recipe.yaml").write_text(block)
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe.model == model
    assert (recipe.lora is not None) == (page == "own_model")


@pytest.mark.slow
def test_the_site_builds_strictly_without_the_network(tmp_path):
    pytest.importorskip("material")
    site = build(ROOT, tmp_path / "site")
    pages = sorted(site.glob("**/*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?([^\"'\s>]+)", text)
        loaded += re.findall(r"<link\b(?![^>]*rel=[\"']?canonical)[^>]*\bhref=[\"']?([^\"'\s>]+)", text)
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], page.name
    for sheet in site.glob("**/*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet.name


@pytest.mark.slow
def test_a_link_that_leads_nowhere_stops_the_site(tmp_path):
    pytest.importorskip("material")
    for name in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "gpu.md").open("a", encoding="utf-8") as page:
        page.write("\n[nowhere](architecture.md#there-is-no-such-part)\n")
    with pytest.raises(subprocess.CalledProcessError):
        build(tmp_path, tmp_path / "site")


def build(home, site):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    subprocess.run(command, cwd=home, check=True, timeout=300)
    return site
