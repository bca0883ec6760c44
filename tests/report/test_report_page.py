import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable
from html.parser import HTMLParser
from statistics import fmean

import numpy as np
import pytest

from workflow_scripts.report import page as report_page
from workflow_scripts.report.data import (
    ContactSheet,
    DatasetSummary,
    LatentMap,
    MethodInfo,
    ReportData,
    SheetRow,
    SkippedImage,
)
from workflow_scripts.report.page import downloads, flatten, format_duration
from workflow_scripts.report.tables import boards

VOID = {"meta", "input", "img", "br", "link", "hr", "col"}


class Outline(HTMLParser):
    """Checks that elements nest, and keeps identifiers, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()} closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"style", "pre", "script"}:
            self.text.append(data)

    def plain(self) -> str:
        return " ".join(" ".join(self.text).split())


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert not parser.open
    identifiers = [attributes["id"] for _, attributes in parser.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    targets = [attributes.get("for") or attributes.get("href") or "" for _, attributes in parser.elements]
    assert {target.lstrip("#") for target in targets if not target.startswith("data:")} <= {"", *identifiers}
    return parser


def assert_self_contained(page: str) -> None:
    without_data = re.sub(r"data:[\w/+-]+;base64,[A-Za-z0-9+/=]+", "data:", page)
    assert "http://" not in without_data and "https://" not in without_data
    assert page.count("<script") == 1 and "@import" not in page and "<link" not in page
    assert "default-src 'none'" in page
    for source in re.findall(r'\bsrc="([^"]{0,20})', page):
        assert source.startswith("data:image/")
    for target in re.findall(r'\bhref="([^"]{0,20})', page):
        assert target.startswith(("#", "data:"))
    assert set(re.findall(r"url\(([^)]{0,1})", page)) <= {"#"}


def render(data: ReportData) -> str:
    return report_page.render(data).html


def checked(data: ReportData) -> str:
    page = render(data)
    assert_self_contained(page)
    return outline(page).plain()


@pytest.fixture(scope="module")
def page(whole: ReportData) -> str:
    return render(whole)


def test_is_well_formed_and_self_contained(page: str) -> None:
    assert_self_contained(page)
    outline(page)
    assert len(page) < 15e6


def test_shows_each_mean_interval_and_count(page: str, whole: ReportData) -> None:
    groups = defaultdict(lambda: defaultdict(list))
    for score in whole.scores:
        for key in (score.architecture, "average"):
            groups[score.method, score.ipc, key][score.seed].append(score.top1_last)
    assert len(groups) == 7 * 2 * 3
    cells = {
        (b.ipc, m, column): c for b in boards(whole) for (m, column, metric), c in b.cells.items() if metric == "last"
    }
    for (method, ipc, column), by_seed in groups.items():
        cell = cells[ipc, method, column]
        mean, (low, high) = fmean(fmean(values) for values in by_seed.values()), cell.interval
        assert f'<span class="mean">{mean:.1f}</span> <span class="ci">{low:.1f} to {high:.1f}</span>' in page
        assert f'<span class="detail">sd {cell.levels.spread:.1f} / –, n 3 / 3</span>' in page
    text = outline(page).plain()
    assert "All entries: one training per distilled set" in text


def test_headline(page: str) -> None:
    text = outline(page).plain()
    assert "Classifiers trained 84" in text
    assert "Distilled sets 42" in text
    assert "Compute time 1 h 26 min" in text
    assert "1 and 10 images per class" in text
    assert re.search(
        r"Best at IPC 10 manifoldgd 68\.\d % 6\d\.\d to \d\d\.\d at 95 % Top-1, last epoch, average of 2 architectures, 3 sets",
        text,
    )


def test_summary_is_three_sentences_of_numbers(page: str, whole: ReportData) -> None:
    (summary,) = re.findall(r'<p class="summary">(.*?)</p>', page)
    assert len(re.findall(r"\. (?=[A-Z])", summary + " ")) == 2
    assert re.search(
        r" and 68\.\d % \(\d\d\.\d to \d\d\.\d\) at IPC 10 with manifoldgd, where chance is 10\.0 %", summary
    )
    assert re.search(r"With 3 distilled sets of each method, \d+ of 21 differences at IPC 10", summary)
    assert "None of the 1 320 generated images is a copy" in summary.replace("\u202f", " "), (
        "random's copies do not count"
    )
    assert "together took 1 h 26 min of computing" in summary


def test_every_section_has_its_figures(page: str, whole: ReportData) -> None:
    parser = outline(page)
    sections = {attributes["id"] for tag, attributes in parser.elements if tag == "section"}
    assert sections >= {"leaderboard", "ranking", "accuracy", "architectures", "ablations", "published", "curves", "classes",
                        "images", "maps", "measures", "copies", "cost", "methods", "protocol", "data", "provenance",
                        "reading"}  # fmt: skip
    for tag, attributes in parser.elements:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
    stems = report_page.render(whole).drawings.keys()
    for name in ("accuracy-hard-sgd-last-average", "architectures-hard-sgd-ipc10", "ablations-hard-sgd-ipc1", "classes-ipc10",
                 "confusion-mgd3-ipc10", "cost-hard-sgd-ipc10", "map-0-0"):  # fmt: skip
        assert name in stems


def test_set_metrics_and_copies(page: str) -> None:
    text = outline(page).plain()
    assert "the autoencoder's latents. These are no FID and no KID" in text and "FID ↓" not in text
    assert (
        "Fréchet distance (latents)" in text
        and "Fréchet distance (latents) : biased upward." in text
        and "* biased at this size" in text
    )
    assert re.search(r'<td data-value="11\.0" class="top">11\.0 <span class="detail block">± 1\.0</span>', page)
    assert "dit 10 300 0 2.0 % 0.80 5.0 %" in text
    assert "herding, kmeans, random: real images" in text
    assert "zero / one: 0.40 of the usual distance" in text and "train/one/7.png" in page


def test_cost_per_method(page: str) -> None:
    text = outline(page).plain()
    assert "dit 4.2 s 1 s 1 min 20 s 1 min 25 s 300 3.75 1 min NVIDIA H100" in text


def test_classes_have_their_titles(minimal: Callable[..., ReportData]) -> None:
    names = ("n01440764", "n02102040")
    summary = DatasetSummary("imagenet", names, (1, 1), (1, 1), {names[0]: "tench", names[1]: "<springer>"})
    black = np.zeros((1, 8, 8, 3), np.uint8)
    sheets = (ContactSheet("random", 1, (SheetRow(names[0], 0, black, black + 9, np.ones(1)),)),)
    maps = (LatentMap(names[1], np.eye(2), {}, {}, (0.5, 0.5)),)
    text = checked(minimal(dataset=summary, sheets=sheets, maps=maps))
    assert (
        "tench n01440764, label 0" in text
        and "<springer>" in text
        and "tench, image 1" in render(minimal(dataset=summary, sheets=sheets))
    )


def test_old_scores_leave_the_classes_out_and_say_so(minimal: Callable[..., ReportData]) -> None:
    text = checked(minimal())
    assert "do not hold the accuracy of each class" in text
    assert "No set was measured" in text and "There are not two methods to compare" in text


def test_tables_beside_the_page(whole: ReportData) -> None:
    beside = downloads(whole)
    assert set(beside) == {"leaderboard.csv", "comparisons.csv", "scores.csv", "leaderboard.tex", "leaderboard.md"}
    assert all(beside.values())


def test_real_images_are_not_paired_with_themselves(page: str) -> None:
    panels = re.findall(r'<div class="panel">.*?(?=<div class="panel">|<section)', page, flags=re.DOTALL)
    assert len(panels) == 14
    for panel in panels:
        pairs, reals = panel.count('class="pair"'), panel.count('class="real"')
        assert reals == (0 if "each is its own nearest" in panel else pairs)
    assert sum("each is its own nearest" in panel for panel in panels) == 6
    assert "nearest real image at latent distance" in page


def test_text_is_escaped(minimal: Callable[..., ReportData]) -> None:
    evil = '<script>alert("&")</script>'
    black = np.zeros((1, 8, 8, 3), np.uint8)
    text = checked(
        minimal(
            title=evil,
            dataset=DatasetSummary(evil, (evil, "one"), (1, 1), (1, 1)),
            sheets=(ContactSheet("random", 1, (SheetRow(evil, 0, black, black + 9, np.ones(1)),)),),
            maps=(LatentMap(evil, np.eye(2), {evil: np.eye(2)}, {"random": np.eye(2)}, (0.5, 0.5)),),
            methods=(MethodInfo("random", evil, {evil: evil}),),
            protocols={evil: {evil: evil}},
            skipped_images=(SkippedImage(evil, evil, evil),),
            environment={evil: evil},
            notes=(evil,),
            config_text=evil,
            digests={evil: evil},
        )
    )
    assert text.count(evil) > 10


def test_one_training_has_no_interval(minimal: Callable[..., ReportData]) -> None:
    page = render(minimal())
    text = checked(minimal())
    mean = f"{minimal().scores[0].top1_last:.1f}"
    assert f"random {mean} † n 1 / 1" in text
    assert 'class="ci"' not in page and "at 95 %" not in text
    assert "Average" not in text and "against random" not in text
    assert "No contact sheets" in text and "No latent maps" in text and "No stage times" in text
    assert "Accuracy by IPC" not in text and "Training curves" not in text


def test_nothing_trained(minimal: Callable[..., ReportData]) -> None:
    assert "No classifier was trained." in checked(minimal(scores=()))


def test_no_top5(minimal: Callable[..., ReportData]) -> None:
    scores = tuple(dataclasses.replace(score, top5_last=None) for score in minimal().scores)
    assert "Top-5" not in checked(minimal(scores=scores))


def test_protocols_are_kept_apart(minimal: Callable[..., ReportData]) -> None:
    first = minimal().scores[0]
    scores = (first, dataclasses.replace(first, protocol="hard-adamw", top1_last=12.3))
    text = checked(minimal(scores=scores))
    assert "IPC 1 hard-sgd Method" in text and "IPC 1 hard-adamw Method" in text
    assert "random 12.3 † n 1 / 1" in text
    assert '<select name="protocol">' in render(minimal(scores=scores))


def test_missing_results_leave_gaps(demo: ReportData) -> None:
    scores = tuple(s for s in demo.scores if (s.method, s.ipc, s.architecture) != ("dit", 10, "convnet"))
    text = checked(dataclasses.replace(demo, scores=scores, sheets=demo.sheets[:1], maps=()))
    assert "dit – – – " in text, "no metric of what was not trained"


def test_empty_parts_of_sheets_and_maps(minimal: Callable[..., ReportData]) -> None:
    none = np.empty((0, 2))
    images = np.zeros((2, 16, 16, 3), np.uint8)
    checked(
        minimal(
            sheets=(
                ContactSheet("random", 1, ()),
                ContactSheet("random", 1, (SheetRow("zero", 0, images), SheetRow("one", 1, images[:0]))),
            ),
            maps=(
                LatentMap("zero", none, {}, {}, (0.0, 0.0)),
                LatentMap("one", np.eye(2), {"k-means": none}, {"random": none}, (1.0, 0.0), ipc=1),
            ),
        )
    )


def test_a_thousand_classes_fit(minimal: Callable[..., ReportData]) -> None:
    rng = np.random.default_rng(0)
    names = tuple(f"n{place:08d}" for place in range(1000))
    methods = tuple(f"method_{place}" for place in range(8))
    photographs = rng.integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)  # noise: the worst case for JPEG
    sheets = tuple(
        ContactSheet(method, ipc, tuple(
            SheetRow(
                name,
                label,
                np.broadcast_to(photographs[0], (min(ipc, 10), 256, 256, 3)),
                np.broadcast_to(photographs[1], (min(ipc, 10), 256, 256, 3)),
                np.ones(min(ipc, 10)),
            )
            for label, name in enumerate(names)
        ))
        for method in methods
        for ipc in (1, 10, 50)
    )  # fmt: skip
    cloud = rng.normal(size=(1300, 2))
    maps = tuple(
        LatentMap(n, cloud, {"k-means": cloud[:10]}, {m: cloud[:10] for m in methods}, (0.1, 0.1), 10) for n in names
    )
    first = minimal().scores[0]
    page = render(
        minimal(
            dataset=DatasetSummary("imagenet1k", names, (1300,) * 1000, (50,) * 1000),
            methods=tuple(map(MethodInfo, methods)),
            ipcs=(1, 10, 50),
            scores=tuple(
                dataclasses.replace(first, method=method, ipc=ipc, seed=seed)
                for method in methods
                for ipc in (1, 10, 50)
                for seed in range(3)
            ),
            sheets=sheets,
            maps=maps,
            skipped_images=(SkippedImage("n00000000", "a.jpg", "unreadable"),) * 1000,
        )
    )
    assert_self_contained(page)
    text = outline(page).plain()
    assert len(page) < 15e6
    assert "12 of 1 000 classes are drawn" in text
    assert re.search(r"Shown: \d+ of 1 000 classes, \d+ of 50 images each", text)
    assert "1 000 left out, the first 200 listed" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.42, "0.42 s"),
        (9.97, "10 s"),
        (59.7, "1 min"),
        (125, "2 min 5 s"),
        (11520, "3 h 12 min"),
        (86400 * 2 + 3600 * 4 + 59, "2 d 4 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_flatten() -> None:
    nested = {
        "kind": "diffusion",
        "sampler": {"steps": 50},
        "guidance": [{"term": "mode"}],
        "crop": (0.5, 1),
        "x": None,
        "y": [],
    }
    assert flatten(nested) == [
        ("kind", "diffusion"),
        ("sampler.steps", "50"),
        ("guidance.1.term", "mode"),
        ("crop", "0.5, 1"),
        ("x", "none"),
        ("y", "none"),
    ]


@pytest.mark.parametrize("change", [{"run": "other"}, {"method": "dit"}, {"ipc": 7}, {"architecture": "vgg"}])
def test_scores_must_belong_to_the_report(minimal: Callable[..., ReportData], change: dict) -> None:
    scores = (dataclasses.replace(minimal().scores[0], **change),)
    with pytest.raises(ValueError, match="but the report has only"):
        minimal(scores=scores)


def test_every_class_needs_its_counts() -> None:
    with pytest.raises(ValueError, match="2 classes need as many counts, not 2 train and 1 test counts"):
        DatasetSummary("digits", ("zero", "one"), (1, 1), (1,))
