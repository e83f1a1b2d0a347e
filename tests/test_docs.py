"""What the documentation shows works, and what it says of the project is so (R8)."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from coterie.cli import app
from coterie.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_r8_the_loop_of_the_update_page_learns(capsys):
    torch.manual_seed(0)
    (code,) = blocks(ROOT / "docs" / "update.md", "python")
    names = {}
    exec(compile(code, "docs/update.md", "exec"), names)
    assert names["metrics"]["reward/mean"] > 0.3  # chance is 1 in 32
    assert "reward" in capsys.readouterr().out


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


def test_every_demand_so_far_is_named_by_a_test():
    named = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for number in (1, 2, 3, 4, 5, 6, 7, 8, 15, 19, 27, 30, 36):
        assert re.search(rf"\b[Rr]{number}\b|_r{number}_", named), f"R{number}"
