"""What a model writes is shown as text, in a terminal too."""

import io

from rich.console import Console as RichConsole

from coterie.runs.console import Console, printable


def test_control_characters_are_escaped_and_language_is_not():
    assert printable("a\x1b[31mb\x00\r\n解方程\t") == "a\\x1b[31mb\\x00\\r\n解方程\t"


def test_markup_of_a_model_is_shown_and_not_obeyed(monkeypatch):
    console, out = Console(), io.StringIO()
    monkeypatch.setattr(console, "_rich", RichConsole(file=out, force_terminal=True, width=80, highlight=False))
    monkeypatch.setattr(console, "_live", True)
    console.say("[red]x[/red] \x1b]0;title\x07")
    console.table("", ("before", "after"), [("[bold]y[/bold]", "[link=http://z]z[/link]")])
    shown = out.getvalue()
    assert "[red]x[/red]" in shown
    assert "\x1b]0;" not in shown
    assert "[bold]y[/bold]" in shown
    assert "[link=http://z]z[/link]" in shown
