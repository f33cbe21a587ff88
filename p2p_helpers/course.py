"""Run the notebooks of a checkout and make pages of them.

    python -m p2p_helpers.course html       run notebooks, write pages and an index; the files stay untouched
    python -m p2p_helpers.course execute    run notebooks and store their outputs in place

Both start a fresh kernel for each notebook, go on when one fails, and then end with status 1.
"""
from __future__ import annotations

import argparse
import base64
import html
import logging
import os
import re
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CELL_SECONDS", "KERNEL_ENVIRONMENT", "badges", "bootstrap", "describe", "execute", "notebook_paths", "page",
           "repository_url", "run"]

ROOT = Path(__file__).resolve().parent.parent
CELL_SECONDS = 300      # a cell that runs longer has failed
KERNEL_ENVIRONMENT = {  # defaults for the kernels; a variable that the caller has set wins
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",        # a bar holds times, which differ from run to run
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "2",     # the order of sums, hence the last digits, depends on the number of threads
}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Entry:
    """One notebook's line of the index."""

    name: str               # file name without its ending
    title: str              # the first H1
    promise: str            # the first paragraph below it
    minutes: int | None     # of study, as the notebook says
    thumbnail: str | None   # the first PNG among the outputs, base64
    seconds: float          # of execution
    error: str | None = None


def notebook_paths(folder: Path) -> list[Path]:
    """The notebooks of a folder, in the order of their names.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    paths = sorted(folder.glob("*.ipynb"))
    if not paths:
        raise FileNotFoundError(f"no notebook (*.ipynb) in the folder {folder}")
    return paths


def repository_url(root: Path = ROOT) -> str:
    """The project's address, which stands in pyproject.toml alone."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"]


def badges(name: str, url: str, branch: str = "main") -> str:
    """Markdown of the three badges that open the notebook file `name` of the GitHub repository `url`."""
    slug = url.removeprefix("https://github.com/")
    raw = f"https://raw.githubusercontent.com/{slug}/{branch}/notebooks/{name}"
    targets = {
        "Colab": f"https://colab.research.google.com/github/{slug}/blob/{branch}/notebooks/{name}",
        "Kaggle": f"https://kaggle.com/kernels/welcome?src={raw}",
        "ModelArts": "https://authoring-modelarts-cnnorth4.huaweicloud.com/console/lab?share-url-b64="
                     + base64.b64encode(raw.encode()).decode(),
    }
    return "\n".join(f"[![Open in {place}](https://img.shields.io/badge/open_in-{place}-orange)]({target})"
                     for place, target in targets.items())


def bootstrap(url: str) -> str:
    """Code of the cell that fetches the course on a hosted platform, and does nothing in a checkout."""
    return f"""\
import importlib.util, subprocess, sys

if importlib.util.find_spec("p2p_helpers") is None:  # on Colab, Kaggle, ModelArts: fetch the course once
    source = "git+{url}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", source], check=True)"""


def execute(notebook, folder: Path, on_cell=None) -> None:
    """Run a notebook in place from a clean kernel and leave only what is the same on every run.

    Parameters
    ----------
    notebook : nbformat.NotebookNode
    folder : Path
        The kernel's working folder.
    on_cell : callable, optional
        Called with no argument after each code cell.

    Raises
    ------
    nbclient.exceptions.CellExecutionError, CellTimeoutError, DeadKernelError
        The outputs up to there are in `notebook` all the same.
    """
    from nbclient import NotebookClient

    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}},
        store_widget_state=False, record_timing=False, extra_arguments=["--IPKernelApp.log_level=ERROR"],
        on_cell_executed=lambda **_: on_cell() if on_cell else None,
    )
    try:
        client.execute(env={**KERNEL_ENVIRONMENT, **os.environ})
    finally:
        notebook.metadata = type(notebook.metadata)(METADATA)
        for cell in code_cells(notebook):
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET_VIEW, None)   # names a model that is gone with its kernel


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def describe(notebook, name: str, seconds: float = 0.0, error: str | None = None) -> Entry:
    """Read a notebook's line of the index from its cells."""
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    heading = re.search(r"^# (.+)\n*((?:[^#\n].*\n?)*)", text, re.MULTILINE)
    minutes = re.search(r"\b(\d+) minutes\b", text)
    pictures = [output.data["image/png"] for cell in code_cells(notebook) for output in cell.outputs
                if "image/png" in output.get("data", {})]
    return Entry(
        name=name,
        title=heading[1].strip() if heading else name,
        promise=" ".join(heading[2].split()) if heading else "",
        minutes=int(minutes[1]) if minutes else None,
        thumbnail="".join(pictures[0].split()) if pictures else None,
        seconds=seconds,
        error=error,
    )


def fold_solutions(notebook):
    """A copy for reading, in which a cell tagged `solution` is a block that opens on a click."""
    from nbformat.v4 import new_markdown_cell

    def folded(cell):
        if "solution" not in cell.metadata.get("tags", []):
            return cell
        code = cell.source.removeprefix("# @title Solution\n")
        return new_markdown_cell(f"<details><summary>Solution</summary>\n\n```python\n{code}\n```\n\n"
                                 "</details>")

    return type(notebook)(notebook, cells=[folded(cell) for cell in notebook.cells])


def page(notebook) -> str:
    """A notebook as one HTML page, whose links to other notebooks lead to their pages."""
    from nbconvert import HTMLExporter

    quiet = logging.Logger("nbconvert", logging.ERROR)  # it warns of figures without alternative text
    body, _ = HTMLExporter(log=quiet).from_notebook_node(fold_solutions(notebook))
    return re.sub(r'href="((?:\./)?[\w.-]+)\.ipynb(#[^"]*)?"', r'href="\1.html\2"', body)


def index(entries: list[Entry]) -> str:
    """The front page: one line for each notebook."""
    rows = []
    for entry in entries:
        picture = f'<img alt="" src="data:image/png;base64,{entry.thumbnail}">' if entry.thumbnail else ""
        study = f"{entry.minutes} minutes, " if entry.minutes else ""
        failed = f'<pre class="failed">failed: {html.escape(entry.error)}</pre>' if entry.error else ""
        rows.append(f'<a class="row" href="{html.escape(entry.name)}.html">'
                    f'<span class="picture">{picture}</span>'
                    f"<span><b>{html.escape(entry.title)}</b><br>{html.escape(entry.promise)}<br>"
                    f"<small>{study}ran in {entry.seconds:.0f} s</small>{failed}</span></a>")
    return INDEX.format(rows="\n".join(rows))


INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Text-driven image editing</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 56rem; margin: 2rem auto;
       padding: 0 1rem }}
.row {{ display: flex; gap: 1.5rem; align-items: center; padding: 1rem 0; border-top: 1px solid #ddd;
       color: inherit; text-decoration: none }}
.row:hover b {{ text-decoration: underline }}
.picture {{ flex: 0 0 14rem }}
.picture img {{ max-width: 14rem; max-height: 8rem }}
.failed {{ color: #a00; white-space: pre-wrap; font-size: 13px }}
small {{ color: #666 }}
</style></head><body>
<h1>Text-driven image editing</h1>
{rows}
</body></html>
"""


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def run(paths: list[Path], finish) -> list[Entry]:
    """Execute notebooks one after the other with a bar, and hand each to ``finish(path, notebook, entry)``.

    A notebook that fails becomes an entry with an error; the others run all the same.
    """
    import nbformat
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from tqdm.auto import tqdm

    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    entries = []
    with tqdm(total=sum(len(code_cells(notebook)) for notebook in notebooks), unit="cell") as bar:
        for path, notebook in zip(paths, notebooks):
            bar.set_description(path.stem)
            start, error = time.monotonic(), None
            try:
                execute(notebook, path.resolve().parent, on_cell=bar.update)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as exception:
                error = re.sub(r"\x1b\[[\d;]*m", "", str(exception)).strip()
            entries.append(describe(notebook, path.stem, time.monotonic() - start, error))
            finish(path, notebook, entries[-1])
            tqdm.write(f"{path.name:40s} {'FAILED' if error else 'ok':6s} {entries[-1].seconds:5.0f} s",
                       file=sys.stderr)
    return entries


def make_pages(paths: list[Path], out: Path) -> list[Entry]:
    """Run notebooks and write their pages and the index into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    entries = run(paths, lambda path, notebook, entry: write(out / f"{path.stem}.html", page(notebook)))
    write(out / "index.html", index(entries))
    print(f"The course is in {out / 'index.html'}: open it in a browser.")
    return entries


def store_outputs(paths: list[Path]) -> list[Entry]:
    """Run notebooks and store their outputs, badges and bootstrap cells in place; one that fails keeps what it had."""
    import nbformat

    url = repository_url()

    def store(path: Path, notebook, entry: Entry) -> None:
        if entry.error:
            return
        for cell in notebook.cells:
            if "badges" in cell.metadata.get("tags", []):
                cell.source = badges(path.name, url)
            if "bootstrap" in cell.metadata.get("tags", []):
                cell.source = bootstrap(url)
        write(path, nbformat.writes(notebook) + "\n")

    return run(paths, store)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m p2p_helpers.course", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("html", "run notebooks, write pages and an index"),
                       ("execute", "run notebooks, store the outputs in place")):
        command = commands.add_parser(name, help=text)
        command.add_argument("notebooks", nargs="*", type=Path, help="default: all in notebooks/")
        if name == "html":
            command.add_argument("--out", type=Path, default=Path("build/course"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    try:
        paths = options.notebooks or notebook_paths(Path("notebooks"))
    except FileNotFoundError as error:
        parser.error(str(error))
    entries = make_pages(paths, options.out) if options.command == "html" else store_outputs(paths)
    failed = [entry for entry in entries if entry.error]
    for entry in failed:
        print(f"\n{entry.name}.ipynb failed:\n{entry.error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
