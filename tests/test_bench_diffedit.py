"""The bench of DiffEdit: what should change, cuts chosen elsewhere, figures that are taken up again."""
from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from p2p_helpers.bench import diffedit as bench
from p2p_helpers.bench.__main__ import main
from p2p_helpers.diffedit import Cut, Difference
from p2p_helpers.masks import SoftMask

SETTINGS, COUNTS = bench.Settings(steps=3), bench.Counts(pictures=2, full_pictures=1, calibration=2)


def picture(*cells) -> np.ndarray:
    """A black picture of 3 x 3 cells with some pixels of cells (row, column, pixels, level) in a grey level."""
    image = np.zeros((24, 24, 3), np.uint8)
    for row, column, pixels, level in cells:
        block = np.zeros(64, np.uint8)
        block[:pixels] = level
        image[8 * row:8 * row + 8, 8 * column:8 * column + 8, 1] = block.reshape(8, 8)
    return image


def test_a_cell_is_changed_where_a_quarter_of_its_pixels_differ_visibly():
    after = picture((0, 0, 16, 17), (0, 1, 15, 255), (1, 1, 64, 16), (2, 2, 64, 200))
    assert bench.changed_cells(picture(), after).tolist() == [[True, False, False], [False] * 3, [False, False, True]]


def test_the_grids_limit_is_the_best_of_all_masks():
    after = picture((0, 0, 64, 99), (0, 1, 40, 99), (1, 0, 20, 99), (2, 2, 3, 99))
    truth = np.abs(after.astype(int)).max(-1) > 16
    every = (np.array([code >> bit & 1 for bit in range(9)], bool).reshape(3, 3) for code in range(1, 2**9))
    best = max(bench.mask_iou(mask.repeat(8, 0).repeat(8, 1), truth) for mask in every)
    assert bench.grid_limit(picture(), after) == pytest.approx(best) and .6 < best < .8
    assert bench.grid_limit(picture(), picture()) == 1


def test_the_best_cut_is_found(monkeypatch):
    heat = torch.tensor([[1., .8, .45, .3], [.4, .2, .1, 0.]])
    monkeypatch.setattr(bench, "CUTS", [Cut(.2), Cut(.35), Cut(.5)])
    assert bench.best_cut([SoftMask(heat)], [(heat > .38).numpy()]) == Cut(.35)


@pytest.fixture
def cheap(monkeypatch):
    """Methods of few evaluations, and how often a map was made."""
    monkeypatch.setattr(bench, "METHODS", {"full": Difference("denoised", noises=1, steps=2, clip=None),
                                           "fast": Difference("fast", noises=2, steps=2, clip=None),
                                           "sequential": Difference("one_step", noises=2, steps=2, batch_size=1)})
    made, estimate = [], bench.estimate_mask
    monkeypatch.setattr(bench, "estimate_mask", lambda *arguments: made.append(1) or estimate(*arguments))
    return made


def test_a_run_is_taken_up_again(tiny_pipe, tmp_path, cheap):
    work = tmp_path / "work.jsonl"
    first = bench.measure(tiny_pipe, work, SETTINGS, COUNTS)
    assert len(cheap) == 7
    lines = work.read_text().splitlines()
    work.write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:20])     # both edits and a map are lost
    assert bench.measure(tiny_pipe, work, SETTINGS, COUNTS) == first and len(cheap) == 8
    with pytest.raises(ValueError, match="was made with strength 0.8, not 0.5"):
        bench.measure(tiny_pipe, work, bench.replace(SETTINGS, strength=.5), COUNTS)


def test_edits_are_judged_outside_the_grown_mask(tiny_pipe, tmp_path, cheap):
    rows = bench.measure(tiny_pipe, tmp_path / "work.jsonl", SETTINGS, COUNTS)["rows"]
    assert [row["edit"] for row in rows] == ["object", "colour"]
    assert all(row["gap"] < -10 for row in rows if "gap" in row)       # the random autoencoder gives nothing back


def test_figures_are_medians_and_bars_can_fail():
    rows = [dict(edit="object", full=.5, fast=.6, limit=.8, gap=-60., gap_decoded=3.),
            dict(edit="colour", full=.6, fast=.7, limit=.9, gap=-50., gap_decoded=2.),
            dict(edit="object", full=.9, fast=.5, limit=.7), dict(edit="colour", fast=.55, limit=.9)]
    seconds = {"full": [10., 20.], "fast": [1., 1.], "sequential": [2., 2.]}
    found = bench.summary({"rows": rows, "cuts": {"full": asdict(Cut(.3))}}, seconds)
    assert (found["mask_iou_full"], found["mask_iou_fast"], found["mask_iou_grid_limit"]) == (.6, .575, .85)
    assert (found["time_fast_over_full"], found["time_fast_over_sequential"]) == (.075, .5)
    assert (found["background_gap_db"], found["background_gap_decoded_db"]) == (-55, 2.5)
    assert found["by_edit"]["object"] == {"full": .7, "fast": .55, "limit": .75}
    assert found["held"] == {"mask_iou_full": True, "mask_iou_fast": True, "time_fast_over_full": False,
                             "time_fast_over_sequential": True, "background_gap_db": True}
    assert "time_fast_over_full            0.075   bar <= 0.0667, MISSED" in bench.table(found)


def test_the_command_writes_what_it_measured(tiny_folder, tmp_path, cheap, capsys):
    main(["diffedit", "--model", str(tiny_folder), "--pictures", "2", "--full-pictures", "2", "--calibration", "2", "--rounds", "1",
          "--steps", "3", "--work", str(tmp_path / "work.jsonl"), "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(bench.BARS) <= set(found)
    assert found["settings"]["command"].endswith(
        "bench diffedit --pictures 2 --full-pictures 2 --calibration 2 --steps 3 --rounds 1")
    assert str(tmp_path) not in json.dumps(found) and "mask_iou_full" in capsys.readouterr().out
