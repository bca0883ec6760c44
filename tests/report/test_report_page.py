import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable
from html.parser import HTMLParser
from statistics import fmean, stdev

import numpy as np
import pytest
from scipy.stats import t

from workflow_scripts.report.data import (
    ContactSheet,
    DatasetSummary,
    LatentMap,
    MethodInfo,
    ReportData,
    SheetRow,
    SkippedImage,
)
from workflow_scripts.report.page import flatten, format_duration, render

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
        if not self.open or self.open[-1] not in {"style", "pre"}:
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
    assert "<script" not in page and "@import" not in page and "<link" not in page
    for source in re.findall(r'\bsrc="([^"]{0,20})', page):
        assert source.startswith("data:image/")
    for target in re.findall(r'\bhref="([^"]{0,20})', page):
        assert target.startswith(("#", "data:"))
    assert set(re.findall(r"url\(([^)]{0,1})", page)) <= {"#"}


def checked(data: ReportData) -> str:
    page = render(data)
    assert_self_contained(page)
    return outline(page).plain()


@pytest.fixture(scope="module")
def page(demo: ReportData) -> str:
    return render(demo)


def test_is_well_formed_and_self_contained(page: str) -> None:
    assert_self_contained(page)
    outline(page)
    assert len(page) < 15e6


def test_shows_each_mean_and_interval(page: str, demo: ReportData) -> None:
    for read in ("top1_last", "top1_best", "top5_last"):
        groups = defaultdict(list)
        averages = defaultdict(lambda: defaultdict(list))
        for score in demo.scores:
            groups[score.method, score.ipc, score.architecture].append(getattr(score, read))
            averages[score.method, score.ipc][score.seed, score.repeat].append(getattr(score, read))
        for key, by_set in averages.items():
            groups[*key, "average"] = [fmean(values) for values in by_set.values()]
        assert len(groups) == 7 * 2 * 3
        for values in groups.values():
            half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
            cell = (
                f'<span class="mean">{fmean(values):.1f}</span> <span class="ci">± {half:.1f}</span></span>\n'
                f'  <span class="detail">sd {stdev(values):.1f} · n {len(values)}</span>'
            )
            assert cell in page
            assert f"95 % interval {fmean(values) - half:.1f} to {fmean(values) + half:.1f}; 3 trainings, 3 " in page


def test_headline(page: str) -> None:
    text = outline(page).plain()
    assert "Classifiers trained 84" in text
    assert "Distilled sets 42" in text
    assert "Compute time 1 h 26 min" in text
    assert "1 and 10 images per class" in text
    assert re.search(
        r"Best at IPC 10 manifoldgd 68\.\d ± \d\.\d % Top-1, last epoch, average of 2 architectures, n 3", text
    )


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
        )
    )
    assert text.count(evil) > 10


def test_one_training_has_no_interval(minimal: Callable[..., ReportData]) -> None:
    page = render(minimal())
    text = checked(minimal())
    mean = f"{minimal().scores[0].top1_last:.1f}"
    assert f"random {mean} n 1" in text
    assert 'class="ci"' not in page and "95 % interval 4" not in page
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
    assert "random 12.3 n 1" in text


def test_missing_results_leave_gaps(demo: ReportData) -> None:
    scores = tuple(s for s in demo.scores if (s.method, s.ipc, s.architecture) != ("dit", 10, "convnet"))
    text = checked(dataclasses.replace(demo, scores=scores, sheets=demo.sheets[:1], maps=()))
    assert "dit – – –" in text


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
