"""The README's example runs, and its links and table of notebooks are true."""
from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def printed(number: int, capsys) -> list[str]:
    """What the README's script of that number prints."""
    script = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[number]
    assert len(script.splitlines()) <= 10
    exec(compile(script, "README.md", "exec"), {})
    return capsys.readouterr().out.splitlines()


def test_the_script_runs_and_prints_what_it_says(capsys):
    scores, shape = printed(0, capsys)
    assert {"object", "colour", "place"} <= eval(scores).keys()
    assert shape == "torch.Size([16, 16]) pixels of a map"


def test_the_script_for_a_given_picture_edits_it(capsys):
    [line] = printed(1, capsys)
    scores, _, share = line.rpartition("} ")
    assert eval(scores + "}") == {"object": 100, "count": 100, "colour": 100, "place": 100, "style": 100}
    assert 3 < int(share.partition("%")[0]) < 50


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_every_notebook_stands_in_the_table():
    assert [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if path.name not in TEXT] == []
    for path, minutes in re.findall(r"\((notebooks/\w+\.ipynb)\) \| (\d+) \|", TEXT):
        assert f"{minutes} minutes" in (ROOT / path).read_text(encoding="utf-8"), path
