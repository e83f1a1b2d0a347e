"""What a model writes is shown as text, in a terminal too."""

import io

from rich.console import Console as RichConsole

from coterie.redact import printable
from coterie.runs.console import Console


def test_control_characters_are_escaped_and_language_is_not():
    assert printable("a\x1b[31mb\x00\r\n解方程\t") == "a\\x1b[31mb\\x00\\r\n解方程\t"


def test_markup_of_a_model_is_shown_and_not_obeyed(monkeypatch):
    console, out = Console(), io.StringIO()
    monkeypatch.setattr(console, "_rich", RichConsole(file=out, force_terminal=True, width=80, highlight=False))
    monkeypatch.setattr(console, "_live", True)
    console.say("[red]x[/red] \x1b]0;title\x07")
    console.warn("[green]w[/green] :warning: \x1b[2J\x9b2J\u202e")
    console.table("[blink]t\x1b[5m", ("[bold]before", "after"), [("[bold]y[/bold]", "[link=http://z]z[/link]")])
    shown = out.getvalue()
    assert "[red]x[/red]" in shown
    assert not [code for code in ("\x1b]0;", "\x1b[2J", "\x1b[5m", "\x9b", "\u202e") if code in shown]
    assert [text for text in ("[green]w", ":warning:", "[blink]t", "[bold]before") if text not in shown] == []
    assert "[bold]y[/bold]" in shown
    assert "[link=http://z]z[/link]" in shown


def test_nothing_plain_steers_the_terminal_either(capsys, monkeypatch):
    """Where the output is no terminal now, it may be shown in one later."""
    console = Console()
    console.warn("a\x1b[31m")
    console.say("b\x1b[31m")
    console.table("c\x1b[31m", ("d\x1b[31m",), [("e\x1b[31m",)])
    monkeypatch.setenv("MY_TOKEN", "0123456789abcdef")
    console.table("0123456789abcdef", ("0123456789abcdef",), [("0123456789abcdef",)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert [letter for letter in "abcde" if f"{letter}\\x1b[31m" not in out] == []
    assert "0123456789abcdef" not in out
