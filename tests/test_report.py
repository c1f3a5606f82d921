"""The report is one file that needs nothing else, says what happened and gives commands that parse."""

from __future__ import annotations

import html
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fake_run import FakeRun, blob, fake_run
from opustomo import config, options
from opustomo.analysis import latents, report, surface
from opustomo.analysis.plots import MANY, png, scatter, training_curves
from opustomo.data.pickles import save_pickle
from opustomo.errors import UserError

METRICS = """epoch,particles,loss,nll,kl,val_nll,val_kl,val_elbo,linear_val_elbo,beta,lr,seconds,particles_per_second
0,216,120.5,110.0,10.5,,,,,1,5e-4,2,100
1,432,100.5,90.0,10.5,95.0,10,-105.0,-110.5,1,5e-4,4,100
"""


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    made, _ = fake_run(tmp_path / "run")
    rng = np.random.default_rng(1)
    (made.path / "analyze.3").mkdir()
    save_pickle(made.path / "analyze.3" / "umap.pkl", rng.normal(size=(240, 2)).astype(np.float32))
    rows = "\n".join(f"tomo/<TS>$x_{{${i % 4}.tomostar p{i}.mrc" for i in range(240))
    made.star.write_text(f"data_\n\nloop_\n_rlnMicrographName\n_rlnImageName\n{rows}\n")
    made.config = {"mask": "my mask.mrc", "note": "<script>alert(1)</script>", "lr": 5e-4}
    (made.path / "metrics.csv").write_text(METRICS)
    (made.path / "run.log").write_text(
        "2026-01-01 10:00:00 INFO    opustomo 0.1, Python 3.11.2: opustomo train a.star\n"
    )
    return made


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.sources.append(value or "")
            if name == "alt":
                self.alts.append(value or "")


@pytest.mark.usefixtures("drawn")
def test_report_is_self_contained_and_complete(run: FakeRun) -> None:
    latents.analyze(run, clusters=3, skip_umap=True)
    (run.path / "evaluation.json").write_text(json.dumps({"composition": {"auc": 0.98765}, "fsc": [0.0] * 30}))
    path = report.write_report(run)
    text = path.read_text()
    page = _Page()
    page.feed(text)
    assert path == run.path / "report.html"
    # no request leaves the page: pictures are embedded, links are anchors of this page
    assert page.sources and all(s.startswith(("data:image/png;base64,", "#")) for s in page.sources)
    assert "script" not in page.tags and "link" not in page.tags and "url(" not in text
    assert all(f'id="{s[1:]}"' in text for s in page.sources if s.startswith("#"))
    assert "class 2, front and side" in page.alts
    for fact in (
        "216 train, 24 held out",
        "48³",
        "UMAP, coloured by viewing direction",
        "0.9877",
        "opustomo train a.star",
    ):
        assert fact in text
    assert "better</b> than the linear stage, by 5.5 nats each" in text
    assert "Along PC2" in text and 'id="tomograms"' in text
    # names from files are text, never markup
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_class_maps_are_written_once_and_again_when_the_classes_changed(run: FakeRun) -> None:
    analysis = latents.analyze(run, clusters=3, skip_umap=True)
    maps = [analysis.clusters_folder / f"reference{i}.mrc" for i in range(3)]

    def times() -> list[int]:
        report.class_volumes(run, analysis)
        return [path.stat().st_mtime_ns for path in maps]

    first = times()
    assert times() == first
    latents.analyze(run, clusters=3, skip_umap=True, seed=1)
    assert all(now > old for now, old in zip(times(), first, strict=True))


def test_commands_on_the_page_parse(run: FakeRun) -> None:
    latents.analyze(run, clusters=3, skip_umap=True)
    text = report.write_report(run).read_text()
    lines = [html.unescape(c) for block in re.findall(r"<pre>(.*?)</pre>", text, re.S) for c in block.splitlines()]
    checked = 0
    for line in lines:
        words = shlex.split(line)
        if words[:2] == ["opustomo", "train"] and "a.star" in words:
            continue
        made, _ = options.parse(getattr(config, f"{words[1].capitalize()}Config"), words[2:], f"opustomo {words[1]}")
        checked += 1
        if words[1] == "train":
            assert made.grid.mask == Path("my mask.mrc")
    assert checked >= 6


def test_a_network_worse_than_the_linear_stage_is_said_so(run: FakeRun) -> None:
    (run.path / "metrics.csv").write_text(METRICS.replace("-105.0", "-120.5"))
    latents.analyze(run, clusters=2, skip_umap=True)
    text = report.write_report(run).read_text()
    assert "worse</b> than the linear stage, by 10 nats each" in text


@pytest.mark.parametrize("gain", [-0.0006, 0.03])
def test_a_small_difference_to_the_linear_stage_is_none(run: FakeRun, gain: float) -> None:
    (run.path / "metrics.csv").write_text(METRICS.replace("-105.0", f"{-110.5 + gain:.4f}"))
    latents.analyze(run, clusters=2, skip_umap=True)
    text = report.write_report(run).read_text()
    assert f"no different from the linear stage ({gain:+.2g} nats each)" in text
    assert "worse</b>" not in text and "better</b>" not in text and f'<b class="">{gain:+.4g}</b>' in text


def test_commands_to_train_repeat_what_the_run_was_made_with(run: FakeRun) -> None:
    latents.analyze(run, clusters=2, skip_umap=True)

    def commands() -> list[str]:
        return [
            html.unescape(c)
            for c in re.findall(r"<pre>(opustomo train .*?)</pre>", report.write_report(run).read_text())
        ]

    run.config = {"mask": "my mask.mrc", "downfrac": 0.75, "datadir": None, "contrast": "black"}
    # the file names in selected.star count from the folder of the STAR file it was taken from
    again = "--mask 'my mask.mrc' --downfrac 0.75 --contrast black"
    assert f"opustomo train selected/selected.star --datadir {run.star.parent} {again} -o selected-run" in commands()
    run.config["datadir"], run.kind = "sub tomo", "linear"
    found = commands()
    assert f"opustomo train selected/selected.star --datadir 'sub tomo' {again} -o selected-run" in found
    assert f"opustomo train {run.star} --datadir 'sub tomo' {again} -o network" in found


def test_one_dimension_has_a_histogram_and_one_traversal(run: FakeRun) -> None:
    run.codes[:, 1:] = 0
    latents.analyze(run, clusters=3, skip_umap=True)
    text = report.write_report(run).read_text()
    assert "The codes vary along 1 dimension only" in text and "1 of 4</b>" in text
    assert "Along PC1" in text and "Along PC2" not in text and "UMAP, coloured" not in text
    run.codes[:] = 0
    latents.analyze(run, clusters=1, skip_umap=True)
    text = report.write_report(run, clusters=1).read_text()
    assert "The codes vary along no dimensions only" not in text and "The codes do not vary" in text
    assert 'id="traversals"' not in text


def test_few_bright_outliers_do_not_set_the_scale_of_the_classes(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = latents.analyze(run, clusters=3, skip_umap=True)
    labels = np.repeat([0, 1, 2], [100, 137, 3])
    analysis = replace(analysis, labels=labels)
    volumes = run.decode(np.asarray(run.codes)[analysis.centre_index])
    volumes[2] *= 100
    levels: list[float] = []
    monkeypatch.setattr(report.plots, "two_views", lambda v, level, *rest: levels.append(level) or np.zeros((4, 4, 4)))
    text = report.classes_section(analysis, volumes).note
    assert 0 < levels[0] < volumes[:2].max()
    assert "1 class has fewer than 5 particles: likely outliers" in text
    even = replace(analysis, labels=np.repeat([0, 1, 2], 80))
    assert "likely outliers" not in report.classes_section(even, volumes).note


def test_class_numbers_of_evaluate_are_told_from_those_of_the_page(run: FakeRun) -> None:
    path = run.path / "evaluation.json"
    path.write_text(json.dumps({"volumes": {"states_found": 2, "class1": {"purity": 0.75}}}))
    [section] = report._truth(path)
    told = html.unescape(section.body)
    assert "volumes.label-free class 1 (evaluate's own numbering).purity" in told and "volumes.states_found" in told


def test_linear_run_without_metrics(run: FakeRun) -> None:
    (run.path / "metrics.csv").unlink()
    run.kind = "linear"
    latents.analyze(run, clusters=2, skip_umap=True)
    text = report.write_report(run).read_text()
    assert 'id="training"' not in text and "Train the network, which starts from this stage" in text


def test_damaged_evaluation_is_one_line(run: FakeRun) -> None:
    latents.analyze(run, clusters=2, skip_umap=True)
    (run.path / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json: cannot be read"):
        report.write_report(run)


def test_surface_is_seen_from_the_stated_direction() -> None:
    # a blob towards +x, +y and, nearer to the viewer, +z
    volume = blob(32, 6, 4, 8, 2.0)
    rows, columns = np.indices((64, 64))

    def centre(view: np.ndarray) -> tuple[float, float]:
        alpha = surface.render(volume, 0.5, 16, view=view, size=64)[..., 3]
        return float((rows * alpha).sum() / alpha.sum()), float((columns * alpha).sum() / alpha.sum())

    # two pixels a voxel; x to the right and y up, and from the side z to the left
    assert centre(surface.FRONT) == pytest.approx((31.5 - 8, 31.5 + 12), abs=0.6)
    assert centre(surface.SIDE) == pytest.approx((31.5 - 8, 31.5 - 16), abs=0.6)


def test_nearer_surface_hides_the_farther_one() -> None:
    near, far = blob(32, 0, 0, 8, 1.5), blob(32, 0, 0, -8, 4.0)
    picture = surface.render(near + far, 0.5, 16, size=64)
    plain = surface.render(far, 0.5, 16, size=64)
    # the small near blob is brighter (depth cue) than the big one behind it and leaves its outline unchanged
    assert picture[26:38, 26:38, :3].max() > plain[26:38, 26:38, :3].max() + 0.02
    np.testing.assert_allclose(picture[..., 3], plain[..., 3], atol=0.01)


def test_flat_and_empty_maps_have_a_picture() -> None:
    for value in (0.0, 1.0):
        volume = np.full((1, 16, 16, 16), value, np.float32)
        level, reach = surface.contour(volume)
        assert np.isfinite(surface.render(volume[0], level, reach, size=32)).all()


def test_many_points_are_drawn_as_densities_and_metrics_may_be_sparse() -> None:
    xy = np.random.default_rng(0).normal(size=(MANY + 1, 2))
    cells = np.asarray(scatter(xy).axes[0].collections[0].get_offsets())
    assert len(cells) < MANY / 4
    empty = np.full(3, np.nan)
    columns = {"epoch": np.arange(3.0), "particles": np.arange(3.0), "loss": empty, "val_elbo": empty}
    assert png(training_curves(columns)).startswith(b"\x89PNG")
