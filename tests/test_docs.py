"""What the documentation shows works, and what it says of the project is so."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from benchmark_code import load
from typer.main import get_command

import coterie
from coterie.cli import app
from coterie.recipe import load_recipe
from coterie.recipe.presets import PRESETS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_loop_of_the_update_page_learns(capsys):
    torch.manual_seed(0)
    (code,) = blocks(ROOT / "docs" / "update.md", "python")
    names = {}
    exec(compile(code, "docs/update.md", "exec"), names)
    assert names["metrics"]["reward/mean"] > 0.3  # chance is 1 in 32
    assert "reward" in capsys.readouterr().out


def test_the_functions_of_a_user_that_are_shown_train(tmp_path):
    """The objective and the advantages of docs/objectives/your_own.md, in one file, named in a recipe."""
    objective, advantages = blocks(ROOT / "docs" / "objectives" / "your_own.md", "python")
    assert max(len(code.splitlines()) for code in (objective, advantages)) <= 15
    (tmp_path / "my_loss.py").write_text(f"{objective}\n{advantages}")
    (tmp_path / "letters.py").write_text(
        "def letters(completions, **columns):\n    return [float(sum(c.isalpha() for c in t[0]['content'])) for t in completions]\n"
    )
    recipe = {
        "model": {"type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
                  "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128},
        "task": "equations", "rewards": "letters.py:letters", "steps": 30, "prompts_per_step": 8, "group_size": 8,
        "loss": {"objective": "my_loss.py:my_objective", "kl_weight": 0},
        "advantage": {"function": "my_loss.py:my_advantages"},
        "sampling": {"max_new_tokens": 12}, "optimiser": {"learning_rate": 3.0e-3},
        "evaluation": {"prompts": 100, "samples": 1},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = coterie.train(str(tmp_path / "recipe.yaml"), out=str(tmp_path / "run"))
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["after"]["reward_interval"][0] > summary["before"]["reward_interval"][1]


def test_adapters_in_one_s_own_loop_learn_and_merge_away(make_model):
    """The lines of docs/lora.md, with an update where they leave it out."""
    (code,) = blocks(ROOT / "docs" / "lora.md", "python")
    before, ellipsis, after = code.partition("...")
    names = {"coterie": coterie, "torch": torch, "model": make_model("qwen3")}
    parameters = dict(names["model"].named_parameters()).keys()
    weights = [parameter.clone() for parameter in names["model"].parameters()]
    exec(compile(before, "docs/lora.md", "exec"), names)
    metrics = coterie.update(
        names["policy"], names["optimiser"], reference=names["reference"], prompts=[[1, 2]], completions=[[[3, 4], [5]]],
        rewards=[[0.0, 1.0]], preset="grpo",
    )  # fmt: skip
    assert metrics["policy/kl"] == 0
    exec(compile(ellipsis + after, "docs/lora.md", "exec"), names)
    assert dict(names["model"].named_parameters()).keys() == parameters
    assert any(not torch.equal(p, w) for p, w in zip(names["model"].parameters(), weights, strict=True))


def test_the_table_of_presets_is_what_the_presets_are():
    page = (ROOT / "docs" / "objectives" / "README.md").read_text(encoding="utf-8")
    table = page.partition("<!-- presets -->")[2].partition("<!-- end -->")[0]
    header, _, *rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.strip().splitlines()
    ]
    assert [row[0].strip("` ") for row in rows] == list(PRESETS)
    columns = {name.strip("` "): number for number, name in enumerate(header)}
    for row in rows:
        values = PRESETS[row[0].strip("` ")]
        assert row[columns["method"]].strip("` ") == values.get("method", "grpo")
        for section, name in (("advantage", "baseline"), ("advantage", "scale"), ("loss", "objective"), ("loss", "ratio"), ("loss", "aggregation")):  # fmt: skip
            assert row[columns[f"{section}.{name}"]].strip("` ") == str(values.get(section, {}).get(name, "-")), row
        weight = str(values.get("loss", {}).get("kl_weight", "-"))
        assert row[columns["loss.kl_weight"]].split()[0].strip("`,") in (weight, "0" if weight == "0.0" else weight), (
            row
        )
        for name in ("clip_low", "clip_high"):
            if name in values.get("loss", {}):
                assert str(values["loss"][name]) in row[columns["clip"]], row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_shown_exists(page):
    """Each `coterie ...` line parses: the command is there and takes these options; recipes that it names load."""
    for block in (*blocks(page, ""), *blocks(page, "sh"), *blocks(page, "bash")):
        for line in block.splitlines():
            words = shlex.split(line, comments=True) if line.startswith(("coterie ", "make ")) else []
            if words[:1] == ["coterie"]:
                command = get_command(app).commands[words[1]]
                context = command.make_context(words[1], words[2:], resilient_parsing=False)
                recipe = context.params.get("recipe")
                if recipe and "mytask" not in recipe:
                    load_recipe(recipe, context.params.get("overrides") or [])
            elif words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_tree_in_the_readme_is_the_tree():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in (ROOT / "coterie").iterdir():
        if folder.is_dir() and not folder.name.startswith("__") and folder.name != "recipes":
            assert f"{folder.name}/" in text, folder.name


def test_every_demand_names_tests_that_exist():
    page = (ROOT / "docs" / "demands.md").read_text(encoding="utf-8")
    demands = re.split(r"^\*\*R(\d+) ", page, flags=re.M)[1:]
    assert demands[::2] == [str(number) for number in range(1, 56)]
    for number, text in zip(demands[::2], demands[1::2], strict=True):
        files = re.findall(r"^- `(\S+\.py)`: (.+)$", text, flags=re.M)
        assert files or "Not built yet." in text, f"R{number}"
        for file, names in files:
            defined = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), flags=re.M)
            assert set(re.findall(r"`(test_\w+)`", names)) <= set(defined), f"R{number}: {file}"


def test_the_path_of_a_step_is_counted_as_it_is_and_leads_nowhere_else():
    reading_path = load("reading_path")
    assert not reading_path.leads_out()
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert reading_path.page() == page, "write it anew: python benchmarks/reading_path.py --write"
    total = sum(reading_path.lines_of(name) for name, _ in reading_path.PATH)
    assert total < 2500  # as the README says
    assert len(reading_path.PATH) <= 24
