from __future__ import annotations

import base64

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from p2p_helpers import course

URL = "https://github.com/someone/somewhere"
FIGURE = "import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])\nplt.show()"


@pytest.fixture
def folder(tmp_path):
    """A folder of three notebooks, the second of which fails."""
    lesson = [new_markdown_cell("old badges", metadata={"tags": ["badges"]}),
              new_markdown_cell("# 01 · Toy\n\nDraw a line & read it.\n\nMore."),
              new_markdown_cell("12 minutes. [two](02_broken.ipynb#top), [web](https://x.org/y.ipynb)"),
              new_code_cell(FIGURE),
              new_code_cell("import ipywidgets\nipywidgets.IntSlider()"),
              new_code_cell("# @title Solution\n6 * 7", metadata={"tags": ["solution"]})]
    broken = [new_markdown_cell("# 02 · Broken"), new_code_cell("print('before')"), new_code_cell("1 / 0")]
    last = [new_markdown_cell("# 03 · Last"), new_code_cell("import os\nprint(os.environ['TQDM_DISABLE'])")]
    for name, cells in (("01_toy", lesson), ("02_broken", broken), ("03_last", last)):
        foreign = {"kernelspec": {"name": "conda-x", "display_name": "x"}}
        nbformat.write(new_notebook(cells=cells, metadata=foreign), tmp_path / f"{name}.ipynb")
    return tmp_path


def outputs(path):
    return [cell.outputs for cell in course.code_cells(nbformat.read(path, as_version=4))]


def test_html_exports_every_notebook_though_one_fails(folder, capsys):
    stored = {path.name: path.read_bytes() for path in folder.glob("*.ipynb")}
    out = folder / "pages"
    paths = [str(path) for path in course.notebook_paths(folder)]

    assert course.main(["html", *paths, "--out", str(out)]) == 1

    assert {path.name: path.read_bytes() for path in folder.glob("*.ipynb")} == stored
    assert sorted(path.name for path in out.iterdir()) == ["01_toy.html", "02_broken.html", "03_last.html",
                                                           "index.html"]
    front = (out / "index.html").read_text()
    assert "01 · Toy" in front and "Draw a line &amp; read it." in front and "12 minutes" in front
    assert front.count("data:image/png;base64,") == 1
    assert "02 · Broken" in front and "ZeroDivisionError" in front
    assert "03 · Last" in front and front.count("failed:") == 1
    page = (out / "01_toy.html").read_text()
    assert 'href="02_broken.html#top"' in page and 'href="https://x.org/y.ipynb"' in page
    assert "<details><summary>Solution</summary>" in page
    assert "before" in (out / "02_broken.html").read_text()
    printed = capsys.readouterr()
    assert str(out / "index.html") in printed.out
    assert "02_broken.ipynb failed" in printed.err and "03_last.ipynb failed" not in printed.err


def test_execute_stores_outputs_that_are_the_same_on_every_run(folder, monkeypatch):
    monkeypatch.setattr(course, "repository_url", lambda: URL)
    path, broken = folder / "01_toy.ipynb", folder / "02_broken.ipynb"
    before = broken.read_bytes()

    assert course.main(["execute", str(path)]) == 0
    first = path.read_bytes()
    assert course.main(["execute", str(path), str(broken)]) == 1

    assert path.read_bytes() == first
    assert broken.read_bytes() == before
    assert list(folder.glob("*.part")) == []
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in course.code_cells(notebook)] == [1, 2, 3]
    assert notebook.metadata == course.METADATA
    assert all("execution" not in cell.metadata for cell in notebook.cells)
    assert notebook.cells[0].source == course.badges("01_toy.ipynb", URL)
    figure, slider, answer = outputs(path)
    assert base64.b64decode(figure[0].data["image/png"]).startswith(b"\x89PNG")
    assert list(slider[0].data) == ["text/plain"]
    assert answer[0].data["text/plain"] == "42"


def test_what_the_caller_sets_wins_over_the_kernels_defaults(folder, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")
    path = folder / "03_last.ipynb"
    assert course.main(["execute", str(path)]) == 0
    assert outputs(path)[0][0].text == "0\n"


def test_badges_lead_to_the_notebook():
    text = course.badges("04_word_swap.ipynb", URL)
    assert "(https://colab.research.google.com/github/someone/somewhere/blob/main/notebooks/04_word" in text
    encoded = text.split("share-url-b64=")[1].split(")")[0]
    assert (base64.b64decode(encoded).decode()
            == "https://raw.githubusercontent.com/someone/somewhere/main/notebooks/04_word_swap.ipynb")


def test_a_notebook_without_title_is_named_by_its_file():
    entry = course.describe(new_notebook(cells=[new_markdown_cell("## Only a section")]), "09_x")
    assert (entry.title, entry.promise, entry.minutes, entry.thumbnail) == ("09_x", "", None, None)


def test_a_folder_without_notebooks_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        course.notebook_paths(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.ipynb"
    path.write_text("old")
    monkeypatch.setattr(course.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        course.write(path, "new")
    assert path.read_text() == "old"
