"""The README's example runs, and its links and table of notebooks are true."""
from __future__ import annotations

import json
import re
from pathlib import Path

from p2p_helpers.inversion import METHODS

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


def measured(name: str) -> dict:
    return json.loads((ROOT / "data" / "measured" / f"{name}.json").read_text(encoding="utf-8"))


def test_figures_of_inversions_are_those_measured():
    rows = {(row["method"], row["editor"]): row for row in measured("inversion")["rows"]}
    assert f"{rows['', 'unchanged']['counterfactual_rmse']:.1f} for the picture left as it is" in TEXT
    for method in METHODS:
        again = [f"{rows[method, editor]['psnr']:.1f}" if (method, editor) in rows else ""
                 for editor in ("none, guidance 1", "none")]
        edits = [f"{row['background_psnr']:.1f}, {row['counterfactual_rmse']:.1f}, {100 * row['oracle_success']:.0f}"
                 for row in (rows[method, editor] for editor in ("p2p", "p2p+blend", "direct sampling"))]
        dearest = rows[method, "p2p+blend"]
        price = [f"{dearest['unet_evaluations']:.0f}", f"{dearest['seconds']:.1f}"]
        assert "| " + " | ".join([method, *again, *edits, *price]) + " |" in TEXT


def test_figures_of_masks_are_those_measured():
    found = measured("diffedit")
    for name, overall in (("full", "full"), ("fast", "fast"), ("limit", "grid_limit")):
        seconds = f"{found['seconds'][name]:.1f}" if name in found["seconds"] else ""
        ious = [found[f"mask_iou_{overall}"], *(found["by_edit"][edit][name] for edit in ("object", "colour"))]
        assert f"| {seconds} | " + " | ".join(f"{iou:.2f}" for iou in ious) + " |" in TEXT
    assert f"{-found['background_gap_db']:.0f} dB above" in TEXT
    assert f"{found['background_gap_decoded_db']:.1f} dB below" in TEXT
