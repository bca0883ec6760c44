"""The page in a real browser: it renders, sorts and filters, says nothing in the console and asks nothing of a network."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from workflow_scripts.report.data import ReportData
from workflow_scripts.report.page import render

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WATCH = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(event.message));
addEventListener("securitypolicyviolation", (event) => problems.push(event.violatedDirective));
for (const level of ["error", "warn"]) console[level] = (...what) => problems.push(what.join(" "));
</script>"""
DRIVE = """<script>
const table = document.querySelector("#leaderboard table");
const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent.trim());
const seen = (selector) => [...document.querySelectorAll(selector)].filter((e) => e.offsetParent !== null).length;
const head = (column) => table.tHead.rows[0].cells[column];
const set = (name, value) => {
  const filter = document.querySelector(`select[name=${name}]`);
  filter.value = value;
  filter.dispatchEvent(new Event("change", {bubbles: true}));
};
const found = {};
found.original = names();
found.columns = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
head(1).querySelector("button").click();
found.descending = names();
found.sort = head(1).getAttribute("aria-sort");
head(1).querySelector("button").click();
found.ascending = names();
document.getElementById("metric-best").click();
head(1).querySelector("button").click();
head(1).querySelector("button").click();
found.best = names();
head(1).querySelector("button").click();
head(1).querySelector("button").click();
found.back = names();
found.boards = seen("#leaderboard table");
set("ipc", "10");
found.boardsAtTen = seen("#leaderboard table");
found.sheetsAtTen = seen("#images h3");
set("architecture", "convnet");
found.visibleColumns = [...document.querySelectorAll("#leaderboard [data-ipc='10'] thead th")]
  .filter((cell) => cell.offsetParent !== null).map((cell) => cell.textContent.trim());
document.querySelector("form.filters button[type=reset]").click();
setTimeout(() => {
  found.boardsAfterReset = seen("#leaderboard table");
  found.requests = performance.getEntriesByType("resource").map((entry) => entry.name).filter((n) => !n.startsWith("data:"));
  found.images = [...document.images].map((image) => image.complete && image.naturalWidth > 0);
  found.wider = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  found.problems = problems;
  const note = document.createElement("pre");
  note.id = "found";
  note.textContent = JSON.stringify(found);
  document.body.append(note);
}, 50);
</script>"""


@pytest.fixture(scope="session")
def chromium() -> str:
    """A Chromium; where there is none, the one of the distribution, if it may be installed."""

    def find() -> str | None:
        return next((path for name in NAMES if (path := shutil.which(name))), None)

    if find() is None and shutil.which("apt-get") and os.geteuid() == 0:
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(
                command, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, timeout=600
            )
    found = find()
    if found is None:
        pytest.skip("no Chromium is installed, and it can be installed here by root with apt-get only")
    return found


def drive(chromium: str, page: str, folder: Path, width: int) -> dict:
    path = folder / f"page-{width}.html"
    head, rest = re.sub(r'<meta http-equiv="Content-Security-Policy"', WATCH + r"\g<0>", page, count=1), DRIVE
    path.write_text(head.replace("</body>", f"{rest}</body>"))
    ended = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},900", "--virtual-time-budget=4000", "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    dumped = re.search(r'<pre id="found">(.*?)</pre>', ended.stdout, flags=re.DOTALL)
    assert dumped is not None, ended.stderr[-2000:]
    found: dict = json.loads(dumped[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return found


def test_the_page_works_in_a_browser(chromium: str, whole: ReportData, tmp_path: Path) -> None:
    page = render(whole).html
    found = drive(chromium, page, tmp_path, 1300)
    assert found["problems"] == [] and found["requests"] == []
    assert found["images"] and all(found["images"])

    means = {
        read: {
            name: sum(
                getattr(s, read) for s in whole.scores if (s.method, s.ipc, s.architecture) == (name, 1, "convnet")
            )
            for name in found["original"]
        }
        for read in ("top1_last", "top1_best")
    }
    assert found["original"] == [method.name for method in whole.methods]
    assert found["columns"][:5] == ["Method", "ConvNet-3", "ResNetAP-10", "Average", "Place"]
    assert found["sort"] == "descending"
    assert found["descending"] == sorted(means["top1_last"], key=lambda name: -means["top1_last"][name])
    assert found["ascending"] == found["descending"][::-1]
    assert found["best"] == sorted(means["top1_best"], key=lambda name: -means["top1_best"][name])
    assert found["back"] == found["original"], "a third click undoes the sorting"

    assert (found["boards"], found["boardsAtTen"], found["boardsAfterReset"]) == (2, 1, 2)
    assert found["sheetsAtTen"] == 1, "filters hold for the whole page"
    assert found["visibleColumns"] == ["Method", "ConvNet-3", "Place", "against random", "against dit"]
    assert not found["wider"]
    assert not drive(chromium, page, tmp_path, 500)["wider"], "on a phone, tables scroll, the page does not"
