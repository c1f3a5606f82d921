"""``opustomo explore``: who is let in, what is answered, and that what the page selects is what the commands select."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import torch

from opustomo import cli
from opustomo.analysis import picked
from opustomo.analysis.volumes import read_codes
from opustomo.bodies import BodyModel, BodyResult, Motions, with_joints
from opustomo.checkpoint import load_tensors, open_run
from opustomo.data.pickles import load_labels, save_pickle
from opustomo.data.readers.relion import identities
from opustomo.data.star import read_star
from opustomo.data.tensors import save_tensors
from opustomo.errors import Interrupted, UserError
from opustomo.explore import gate, server, work
from opustomo.explore.answers import GET, POST, Desk
from opustomo.explore.gate import Refused
from opustomo.explore.view import View
from opustomo.physics.bodies import soft_bodies
from opustomo.physics.volume import centred_coordinates, fourier_shell_correlation
from small_set import PARTICLES, SmallSet, analysed


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run, analysed."""
    return analysed(finished_run, tmp_path_factory.mktemp("explore") / "run", 2)


@dataclass
class Site:
    server: server.Server

    def cookie(self) -> str:
        return f"{gate.cookie_name(self.server.token)}={self.server.token}"

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers, body; with the cookie unless another is given."""
        link = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        link.request(method, path, body, {"Cookie": self.cookie(), **named})
        answer = link.getresponse()
        content = answer.read()
        link.close()
        return answer.status, answer.headers, content

    def json(self, path: str, method: str = "GET", body: bytes | None = None) -> Any:
        status, _, content = self.ask(path, method, body)
        assert status == 200, content
        return json.loads(content)

    def packet(self, path: str, kind: str = "<f4") -> tuple[dict[str, Any], np.ndarray]:
        status, _, content = self.ask(path)
        assert status == 200, content
        length = int.from_bytes(content[:4], "little")
        return json.loads(content[4 : 4 + length]), np.frombuffer(content[4 + length :], kind)

    def job(self, address: str, **asked: Any) -> dict[str, Any]:
        """A job's end."""
        number = self.json(f"/api/0/{address}", "POST", json.dumps(asked).encode())["number"]
        for _ in range(600):
            job = next(job for job in self.json("/api/0/jobs") if job["number"] == number)
            if job["state"] in ("done", "failed"):
                return dict(job)
            time.sleep(0.05)
        raise AssertionError("the job does not end")


@pytest.fixture(scope="module")
def site(run: Path) -> Iterator[Site]:
    opened = server.open_server([run])
    thread = threading.Thread(target=opened.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield Site(opened)
    opened.shutdown()
    thread.join()
    opened.server_close()
    opened.desks[0].close()


# --- who is let in ---


def test_only_the_loopback_device_is_listened_to(site: Site) -> None:
    assert site.server.socket.getsockname()[0] == "127.0.0.1"


def test_the_link_lets_in_and_leaves_a_cookie_that_scripts_cannot_read(site: Site) -> None:
    status, headers, body = site.ask(f"/?token={site.server.token}", Cookie="")
    assert status == 200 and b"opustomo explore" in body
    assert headers["Set-Cookie"].endswith("Path=/; HttpOnly; SameSite=Strict")
    assert site.ask("/", Cookie=headers["Set-Cookie"].split(";")[0])[0] == 200


@pytest.mark.parametrize("cookie", ["", "x=y", "{name}=wrong", "{name}={token}x", "{name}=", '{name}="\xe4', "=;==;\\"])
def test_without_the_token_nothing_is_answered(site: Site, cookie: str) -> None:
    wrong = cookie.replace("{name}", gate.cookie_name(site.server.token)).replace("{token}", site.server.token)
    for path in ("/", "/app.js", "/api/0/about", "/api/runs", "/?token=wrong", "/?token="):
        status, headers, body = site.ask(path, Cookie=wrong)
        assert status == 403 and "token" in json.loads(body)["error"] and "Set-Cookie" not in headers


def test_a_wrong_token_in_the_link_is_refused_though_the_cookie_is_right(site: Site) -> None:
    assert site.ask("/?token=wrong")[0] == 403


def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is the library's that does not stop at the first difference, and it decides."""
    seen = []
    monkeypatch.setattr(gate.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or True)
    gate.admit("GET", "/", {"host": "localhost"}, "right", "wrong")
    assert seen == [(b"wrong", b"right")]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:99", "[::1]:8642", "LOCALHOST:1"])
def test_a_tunnel_may_have_any_port(site: Site, host: str) -> None:
    assert site.ask("/api/0/about", Host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.org", "127.0.0.1.evil.org", "localhost.:80", "", "127.0.0.1:x", "[::1", "a@localhost", "localhost/x"]
)
def test_another_host_is_refused(site: Site, host: str) -> None:
    """A name that somebody has pointed at this machine reads nothing, even with the cookie."""
    status, _, body = site.ask("/api/0/about", Host=host)
    assert status == 403 and "localhost" in json.loads(body)["error"]


def test_other_sites_are_refused(site: Site) -> None:
    here = f"127.0.0.1:{site.server.server_port}"
    assert site.ask("/api/0/about", Origin=f"http://{here}")[0] == 200
    assert site.ask("/api/0/about", Sec_Fetch_Site="same-origin")[0] == 200
    for origin in ("http://evil.org", "null", f"https://{here}", "http://127.0.0.1:1"):
        assert site.ask("/api/0/about", Origin=origin)[0] == 403
        assert site.ask("/api/0/selection?name=a", "POST", b"\0" * 4, Origin=origin)[0] == 403
        assert site.ask(f"/?token={site.server.token}", Origin=origin)[0] == 403
    for where in ("cross-site", "same-site"):
        assert site.ask("/api/0/about", Sec_Fetch_Site=where)[0] == 403
        # a person may click the link in a mail; a page may not fetch it
        link = f"/?token={site.server.token}"
        assert site.ask(link, Sec_Fetch_Site=where, Sec_Fetch_Mode="navigate")[0] == 200
        assert site.ask(link, Sec_Fetch_Site=where, Sec_Fetch_Mode="no-cors")[0] == 403


def test_every_answer_forbids_what_the_page_does_not_need(site: Site) -> None:
    for path in ("/", "/app.js", "/api/0/about", "/nothing"):
        headers = site.ask(path)[1]
        policy = headers["Content-Security-Policy"]
        assert (
            policy.startswith("default-src 'self';") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        )
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        assert "Python" not in headers["Server"]


PATHS = [
    "/" + "../" * 12 + "etc/passwd", "/" + "%2e%2e/" * 12 + "etc/passwd", "//etc/passwd", "/../server.py",
    "/%2e%2e/server.py", "/..%2fserver.py", "/page/../../server.py", "/../../../../pyproject.toml", "/page/app.js",
    "/vendor/README.txt", "/server.py", "/api/0/../../app.js", "/api/0/about/x", "/api/1/about", "/api/-1/about",
    "/api/0x0/about", "/api/9999/about", "/api/0", "/api/0/file?job=1&name=../../config.yaml", "/api/0/nothing",
    "/app.js/", "/app.js%00", "/api/0/__class__",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_there_is_nothing_at_other_addresses(site: Site, path: str) -> None:
    status, _, body = site.ask(path)
    assert status in (400, 404) and list(json.loads(body)) == ["error"]


def raw(site: Site, words: bytes) -> tuple[int, bytes]:
    """Status and body of an answer to these bytes, and that the connection is closed after it."""
    with socket.create_connection(("127.0.0.1", site.server.server_port), timeout=20) as link:
        link.sendall(words)
        link.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: link.recv(65536), b""))
    return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]


def test_malformed_requests_get_one_line(site: Site) -> None:
    head = f"Host: localhost\r\nCookie: {site.cookie()}\r\n".encode()
    post = b"POST /api/0/selection?name=a HTTP/1.1\r\n" + head
    wrong = {
        b"\x16\x03\x01\x02\x00\r\n\r\n": 400,
        b"GET\r\n\r\n": 400,
        b"GET / HTTP/9.9\r\n\r\n": 505,
        b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n": 414,
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n": 431,
        b"DELETE / HTTP/1.1\r\n" + head + b"\r\n": 405,
        b"OPTIONS / HTTP/1.1\r\n" + head + b"\r\n": 405,
        b"GET http://localhost/ HTTP/1.1\r\n" + head + b"\r\n": 400,
        b"GET /\xff HTTP/1.1\r\n" + head + b"\r\n": 400,
        b"GET /api/0/about HTTP/1.1\r\nHost: localhost\r\n\r\n": 403,
        post + b"\r\n": 411,
        post + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n": 411,
        post + b"Content-Length: -1\r\n\r\n": 400,
        post + b"Content-Length: 4e0\r\n\r\n": 400,
        post + b"Content-Length: 99999999999\r\n\r\n": 413,
        post + b"Content-Length: 3\r\n\r\nabc": 400,
        b"POST /api/0/about HTTP/1.1\r\n" + head + b"Content-Length: 0\r\n\r\n": 405,
        b"GET /api/0/export HTTP/1.1\r\n" + head + b"\r\n": 405,
    }
    for words, expected in wrong.items():
        status, body = raw(site, words)
        assert status == expected, words[:80]
        assert body.count(b"\n") == 0 and set(json.loads(body)) == {"error"}, words[:80]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("map?at=row:60", "rows 0 to 59"),
        ("map?at=row:-1", "names no code"),
        ("map?at=row:" + "9" * 400, "rows 0 to 59"),
        ("map?at=class:kmeans3:7", "classes 0 to 2"),
        ("map?at=class:kmeans99:0", "cannot be read"),
        ("map?at=class:../x:0", "names no code"),
        ("map?at=pc:9", "components 1 to 2"),
        ("map?at=pc:1&n=1000", "2 to 100"),
        ("map?at=pc:1&i=10", "maps 0 to 9"),
        ("map?at=pc:1&i=x", "whole number"),
        ("map?at=path:3-3", "no way"),
        ("map?at=selection:none", "not there"),
        ("map?at=_codes:1", "names no code"),
        ("map", "names no code"),
        ("column?name=nothing", "no column"),
        ("column?name=" + "a" * 9000, "no column"),
        ("about?epoch=17", "no epoch 17"),
        ("nearest?row=3&k=x", "whole number"),
        ("nearest?row=-1&k=3", "rows 0 to 59"),
        ("particle?row=60", "rows 0 to 59"),
        ("selection?name=../../config", "is no name"),
        ("file?job=99&name=x", "no such file"),
    ],
)
def test_questions_that_cannot_be_answered_are_told_so(site: Site, path: str, words: str) -> None:
    status, _, body = site.ask(f"/api/0/{path}")
    assert status in (400, 404) and words in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("address", "body"),
    [
        ("export", b"{"), ("export", b"[]"), ("export", b"[" * 60000), ("export", b'{"selection": 3}'),
        ("analyze", b'{"selection": "a", "clusters": true}'), ("analyze", b'{"selection": "a", "clusters": 0}'),
        ("movie", b'{"at": "row:3"}'), ("movie", b'{"at": "pc:1", "n": 2.5}'),
        ("movie", b'{"at": "pc:1", "level": "x"}'),
        ("selection?name=", b"\0\0\0\0"), ("selection?name=.x", b"\0\0\0\0"), ("selection?name=a%2Fb", b"\0\0\0\0"),
        ("selection?name=big", b"\xff\xff\0\0"), ("selection?name=none", b""),
    ],
)  # fmt: skip
def test_bad_orders_change_nothing(site: Site, run: Path, address: str, body: bytes) -> None:
    before = sorted(run.rglob("*"))
    status, _, answer = site.ask(f"/api/0/{address}", "POST", body)
    assert status == 400 and json.loads(answer)["error"]
    assert sorted(run.rglob("*")) == before


# --- what is answered ---


def test_what_there_is(site: Site, run: Path) -> None:
    about = site.json("/api/0/about")
    assert about["particles"] == PARTICLES and about["epochs"] == [0, 1, 2] and about["epoch"] == 2
    assert ["class:kmeans3:2", "class 2 of k-means 3"] in about["maps"] and ["pc:1", "along PC1"] in about["maps"]
    assert about["columns"]["class:kmeans3"] == {"label": "k-means 3", "heading": "Classes", "names": True}
    assert "pc:1" in about["columns"] and "evidence" in about["columns"]
    more = site.json("/api/0/columns")
    assert {"turn", "shift", "tomogram", "place:x"} <= set(more) and any(name.startswith("star:") for name in more)
    opened = open_run(run, 1)
    assert np.array_equal(site.packet("/api/0/column?name=z:2&epoch=1")[1], opened.codes[:, 1])


def test_every_column_that_is_offered_can_be_had(site: Site) -> None:
    for name in {**site.json("/api/0/about")["columns"], **site.json("/api/0/columns")}:
        header, values = site.packet(f"/api/0/column?name={name}")
        assert len(values) == PARTICLES and np.isfinite(values).any(), name
        if header["names"] is not None:
            assert len(header["colours"]) == len(header["names"]) > values[np.isfinite(values)].max()


def test_columns_are_what_they_are_called(site: Site, run: Path, small_set: SmallSet) -> None:
    opened, star = open_run(run), read_star(small_set.star)
    labels = load_labels(run / "analyze.2" / "kmeans3" / "labels.pkl")
    assert np.array_equal(site.packet("/api/0/column?name=class:kmeans3")[1], labels)
    given = star.particles["rlnAngleTilt"].to_numpy(float)
    name = next(name for name in site.json("/api/0/columns") if name.endswith("AngleTilt"))
    assert np.allclose(site.packet(f"/api/0/column?name={name}")[1], given)
    evidence = (opened.linear_results() or {})["evidence"]
    assert np.allclose(site.packet("/api/0/column?name=evidence")[1], evidence)
    # poses were given with errors of 2 degrees, and corrected
    assert 0.3 < np.median(site.packet("/api/0/column?name=turn")[1]) < 6


def test_maps_are_the_decoders(site: Site, run: Path) -> None:
    opened = open_run(run)
    header, volume = site.packet("/api/0/map?at=row:7")
    assert np.allclose(volume.reshape((header["size"],) * 3), opened.decode(opened.codes[[7]])[0], atol=1e-6)
    centre = read_codes(run / "analyze.2" / "kmeans3" / "centers.txt", opened.codes.shape[1])[[1]]
    header, volume = site.packet("/api/0/map?at=class:kmeans3:1")
    assert np.allclose(volume, opened.decode(centre).ravel(), atol=1e-5)
    assert header["command"] == f"opustomo volumes {run} --kmeans 3" and 0 < header["level"] < volume.max()
    assert site.packet("/api/0/map?at=pc:1&epoch=1")[0]["command"] == f"opustomo volumes {run} --pc 1 --epoch 1"
    steps = read_codes(run / "analyze.2" / "pc1" / "z_pc.txt", opened.codes.shape[1])
    assert np.allclose(site.packet("/api/0/map?at=pc:1&i=4")[1], opened.decode(steps[[4]]).ravel(), atol=1e-4)


def test_a_way_is_the_commands_way(site: Site, run: Path) -> None:
    """The maps along a drawn path are those of the command line that the page shows for it."""
    header, last = site.packet("/api/0/map?at=path:3-40-11&n=4&i=3")
    words = header["command"].split()
    assert cli.main([*words[1:], "-o", str(run / "way")]) == 0
    with mrcfile.open(run / "way" / "reference3.mrc") as written:
        assert np.allclose(written.data.ravel(), last, atol=1e-5)
    opened = open_run(run)
    assert np.allclose(last, opened.decode(opened.codes[[11]]).ravel(), atol=1e-5)


def test_a_map_as_a_file(site: Site, run: Path, tmp_path: Path) -> None:
    status, headers, body = site.ask("/api/0/mrc?at=row:5")
    assert status == 200 and "particle_6.mrc" in headers["Content-Disposition"]
    (tmp_path / "map.mrc").write_bytes(body)
    opened = open_run(run)
    with mrcfile.open(tmp_path / "map.mrc") as written:
        assert np.allclose(written.data, opened.decode(opened.codes[[5]])[0], atol=1e-6)
        assert float(written.voxel_size.x) == pytest.approx(opened.grid.working_pixel)


def test_fsc_of_two_maps(site: Site, run: Path) -> None:
    opened = open_run(run)
    maps = [torch.from_numpy(opened.decode(opened.codes[[i]])[0]) for i in (2, 30)]
    found = site.json("/api/0/fsc?a=row:2&b=row:30")
    assert np.allclose(found["fsc"], fourier_shell_correlation(*maps), atol=1e-5)
    assert site.json("/api/0/fsc?a=row:2&b=row:2")["fsc"] == pytest.approx([1.0] * len(found["fsc"]), abs=1e-5)


def test_the_nearest(site: Site, run: Path) -> None:
    codes = open_run(run).codes
    wanted = np.argsort(np.linalg.norm(codes - codes[9], axis=1))[:7]
    assert set(site.packet("/api/0/nearest?row=9&k=7", "<u4")[1]) == set(wanted)


def test_a_particle(site: Site, run: Path, small_set: SmallSet) -> None:
    """Its sections are those of its file; its poses before and after differ by what is told."""
    facts, values = site.packet("/api/0/particle?row=4")
    assert [p["title"] for p in facts["pictures"]][:3] == [f"subtomogram across {axis}" for axis in "zyx"]
    assert len(facts["pictures"]) == 12 and facts["notes"] == []
    with mrcfile.open(small_set.folder / read_star(small_set.star).particles["rlnImageName"][4]) as raw_file:
        n = len(raw_file.data)
        assert np.allclose(values[: n * n].reshape(n, n), raw_file.data[n // 2][::-1])
    assert sum(p["width"] * p["height"] for p in facts["pictures"]) == len(values)
    moved = np.linalg.norm(np.subtract(facts["origin"], facts["origin_given"])) * open_run(run).grid.pixel_size
    assert facts["shift"] == pytest.approx(moved, abs=0.3)


def test_training_is_told_before_and_after_there_are_codes(site: Site, run: Path, tmp_path: Path) -> None:
    found = site.json("/api/0/live")
    assert (
        not found["running"]
        and ": done\n" in found["words"]
        and found["epochs"] == [0, 1, 2]
        and len(found["loss"]) >= 3
    )
    assert site.ask("/api/0/preview")[2].startswith(b"\x89PNG") or not (run / "tmp.png").stat().st_size
    (tmp_path / "run.log").write_bytes((run / "run.log").read_bytes())
    desk = Desk(tmp_path)
    assert json.loads(GET["live"](desk, {}).body)["epochs"] == []
    with pytest.raises(UserError, match="no run here"):
        GET["about"](desk, {})
    desk.close()


# --- what is written ---


def test_a_selection_is_the_same_at_the_command_line(
    site: Site, run: Path, small_set: SmallSet, tmp_path: Path
) -> None:
    rows = np.array([3, 5, 8, 59], "<u4")
    answer = site.json("/api/0/selection?name=good.ones", "POST", rows[::-1].tobytes())
    assert answer["selections"] == ["good.ones"]
    assert np.array_equal(site.packet("/api/0/selection?name=good.ones", "<u4")[1], rows)
    job = site.job("export", selection="good.ones")
    assert job["state"] == "done" and job["command"] == answer["command"]
    file = f"/api/0/file?job={job['number']}&name="
    page = site.ask(file + "selected.star")[2]
    assert (run / "selections" / "good.ones" / ".." / ".." / "config.yaml").is_file()
    for name in ("../../config.yaml", "%2e%2e/%2e%2e/config.yaml", "/etc/passwd", str(run / "config.yaml"), ""):
        assert site.ask(file + name)[0] == 404
    (tmp_path / "page.star").write_bytes(page)
    words = answer["command"].split()[1:]
    words[words.index("-o") + 1] = str(tmp_path / "typed")
    assert cli.main(words) == 0
    names = identities(read_star(small_set.star))[rows]
    for path in (tmp_path / "page.star", tmp_path / "typed" / "selected.star"):
        star = read_star(path)
        assert np.array_equal(identities(star), names)
        assert list(star.particles.columns) == list(read_star(small_set.star).particles.columns)
    manifest = json.loads((tmp_path / "typed" / "manifest.json").read_text())
    assert manifest["selection"] == "good.ones" and manifest["counts"] == {"0": 4} and manifest["classes"] is None


def test_poses_as_corrected(site: Site, run: Path) -> None:
    site.json("/api/0/selection?name=two", "POST", np.array([1, 2], "<u4").tobytes())
    assert site.job("export", selection="two", corrected=True)["state"] == "done"
    tilt = read_star(run / "selections" / "two" / "selected.star").particles["rlnAngleTilt"].to_numpy(float)
    assert np.allclose(tilt, open_run(run).euler[[1, 2], 1], atol=1e-3)


def test_a_selection_is_of_these_particles(
    run: Path, small_set: SmallSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picked.write_selection(run, "mine", np.array([1, 2]))
    kept = json.loads((run / "selections" / "mine.json").read_text())
    line = ["select", str(small_set.star), "--run", str(run), "-o", str(tmp_path / "out"), "--selection"]
    for name, change, words in (
        ("other", {"identity": "0" * 64}, "is of other particles"),
        ("fewer", {"particles": 59}, "is of other particles"),
        ("beyond", {"rows": [1, 60]}, "rows 1 to 60 where the run has 0 to 59"),
        ("none", {"rows": []}, "the selection is empty"),
        ("words", {"rows": ["1"]}, "rows are no row numbers"),
        ("deep", {"rows": [[1]]}, "rows are no row numbers"),
    ):
        (run / "selections" / f"{name}.json").write_text(json.dumps(kept | change))
        assert cli.main([*line, name]) == 2
        assert words in capsys.readouterr().err
        (run / "selections" / f"{name}.json").unlink()
    (run / "selections" / "cut.json").write_text(json.dumps(kept)[:-20])
    assert cli.main([*line, "cut"]) == 2 and "cannot be read" in capsys.readouterr().err
    (run / "selections" / "cut.json").unlink()
    assert cli.main([*line, "gone"]) == 2 and "not there (selections of this run:" in capsys.readouterr().err
    assert cli.main([*line, "mine", "--classes", "0"]) == 2 and "give one of them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_selection_is_classified_again(site: Site, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page's job and the command it shows find the same classes, of these particles alone."""
    rows = np.arange(0, 40, dtype="<u4")
    site.json("/api/0/selection?name=part", "POST", rows.tobytes())
    job = site.job("analyze", selection="part", clusters=2)
    assert job["state"] == "done", job
    path = run / "analyze.filter.2" / "kmeans2" / "labels.pkl"
    labels = load_labels(path, -1)
    assert (labels[:40] >= 0).all() and (labels[40:] == -1).all()
    assert "umap:filter.1" not in site.json("/api/0/about")["columns"]
    values = site.packet("/api/0/column?name=class:filter.kmeans2")[1]
    assert np.isnan(values[40:]).all() and np.array_equal(values[:40], labels[:40])
    path.unlink()
    save_pickle(path.parents[1] / "umap.pkl", np.arange(80, dtype=np.float32).reshape(40, 2))
    assert cli.main(job["command"].split()[1:]) == 0
    assert np.array_equal(load_labels(path, -1), labels)
    assert ["class:filter.kmeans2:1", "class 1 of k-means 2, second round"] in site.json("/api/0/about")["maps"]
    assert np.array_equal(site.packet("/api/0/column?name=umap:filter.2")[1][:40], np.arange(1, 80, 2))
    header, volume = site.packet("/api/0/map?at=class:filter.kmeans2:1")
    assert header["command"] == f"opustomo volumes {run} --filtered --kmeans 2"
    assert np.abs(volume - site.packet("/api/0/map?at=class:kmeans3:1")[1]).max() > 1e-4
    site.json("/api/0/selection?name=part", "POST", (rows + 1).tobytes())
    assert cli.main(job["command"].split()[1:]) == 0
    assert "umap:filter.2" not in site.json("/api/0/about")["columns"], "which was of other particles"
    assert cli.main(["analyze", str(run), "--selection", "part", "--within", "3:0"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_a_movie(site: Site, run: Path) -> None:
    job = site.job("movie", at="pc:1", n=3, level=None)
    assert job["state"] == "done" and {"reference.gif", "reference.cxc", "reference2.mrc"} <= set(job["files"])
    assert site.ask(f"/api/0/file?job={job['number']}&name=reference.gif")[2].startswith(b"GIF8")
    assert (run / "explore" / "pc1_3.2" / "reference.gif").is_file()
    assert cli.main([*job["command"].split()[1:], "--size", "64"]) == 0
    way = site.job("movie", at="between:3-11", n=2, level=0.01)["command"]
    assert way == f"opustomo movie {run} --between 3 11 --points 2 --level 0.01" and cli.parse_verb(way.split()[1:])
    high = site.job("movie", at="pc:1", n=3, level=1e9)
    assert high["state"] == "failed" and "--level" in high["message"]


def test_nobody_waits_for_the_star_file(site: Site) -> None:
    """A large one takes its time: maps and colours by codes are had meanwhile."""
    with site.server.desks[0].view({}).reading:
        assert site.ask("/api/0/map?at=row:13")[0] == site.ask("/api/0/column?name=pc:1")[0] == 200
        assert site.ask("/api/0/about")[0] == 200


# --- the queue ---


def test_one_map_is_made_at_a_time_and_each_once() -> None:
    decoder, busy, most, made = work.Decoder(), threading.Semaphore(), [0, 0], []

    def make(i: int) -> np.ndarray:
        most[0] += 1
        most[1] = max(most)
        time.sleep(0.002)
        made.append(i)
        most[0] -= 1
        return np.full(10, i, np.float32)

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda i: decoder.get(i % 8, lambda: make(i % 8))[0], range(32)))
    assert most[1] == 1 and sorted(made) == list(range(8)) and found == [i % 8 for i in range(32)]
    decoder.close()
    assert busy.acquire(blocking=False)


def test_kept_maps_have_a_bound_and_those_used_last_stay() -> None:
    decoder = work.Decoder(memory=4000)
    for i in range(20):
        decoder.get(i, lambda: np.zeros(250, np.float32))
        decoder.get(0, lambda: np.zeros(250, np.float32))
        assert decoder.held <= 4000
    assert 0 in decoder._kept and 19 in decoder._kept and 5 not in decoder._kept
    decoder.close()


def test_a_full_queue_says_so_and_goes_on() -> None:
    decoder, free = work.Decoder(waiting=2), threading.Event()

    def slow() -> np.ndarray:
        assert free.wait(20)
        return np.zeros(1, np.float32)

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(decoder.get, i, slow) for i in range(2)]
        while len(decoder._coming) < 2:
            time.sleep(0.001)
        with pytest.raises(Refused) as refused:
            decoder.get(2, slow)
        assert refused.value.status == 503
        free.set()
        assert all(len(w.result()) == 1 for w in waiting)
    assert len(decoder.get(2, slow)) == 1
    with pytest.raises(ZeroDivisionError):
        decoder.get(3, lambda: np.ones(1, np.float32) / (1 // 0))
    assert decoder._coming == {}
    decoder.close()


def test_thirty_two_at_once(site: Site) -> None:
    """Different maps, asked for in parallel: all are answered, none twice."""
    decoder = site.server.desks[0].decoder
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda i: site.ask(f"/api/0/map?at=row:{i}"), range(20, 52)))
    assert [status for status, _, _ in found] == [200] * 32
    assert len({body for _, _, body in found}) > 30 and decoder.held <= decoder.memory


def test_jobs_have_a_bound_and_failures_are_told() -> None:
    jobs, free = work.Jobs(), threading.Event()

    def wait() -> list[Path]:
        assert free.wait(20)
        return []

    started = [jobs.start("wait", "", wait) for _ in range(work.JOBS + 1)]
    with pytest.raises(Refused, match="wait for one"):
        jobs.start("one more", "", wait)
    free.set()

    def fails() -> list[Path]:
        raise RuntimeError("broken")

    while any(job.state != "done" for job in started):
        time.sleep(0.005)
    bad = jobs.start("bad", "", fails)
    while bad.state != "failed":
        time.sleep(0.005)
    assert "RuntimeError" in bad.message
    jobs.close()


# --- the verb ---


def test_the_verb_prints_the_link_and_ctrl_c_ends_it(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []

    def serve(self: server.Server) -> None:
        served.append(self)
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(server.Server, "serve_forever", serve)
    monkeypatch.setattr(server.webbrowser, "open", lambda link: pytest.fail("a browser was opened"))
    assert cli.main(["explore", str(run), "--no-browser"]) == 0
    said = capsys.readouterr().out
    port, token = served[0].server_port, served[0].token
    assert f"http://127.0.0.1:{port}/?token={token}" in said and f"ssh -L {port}:127.0.0.1:{port}" in said
    assert len(token) >= 32
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_another_signal_is_no_success(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(self: server.Server) -> None:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(server.Server, "serve_forever", serve)
    assert cli.main(["explore", str(run), "--no-browser"]) == 143


def test_a_browser_is_given_a_file_not_the_token(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of a command are for all users of a machine to see."""
    opened: list[tuple[str, str]] = []
    seen = threading.Event()

    def look(link: str) -> None:
        opened.append((link, Path(link.removeprefix("file://")).read_text()))
        seen.set()

    monkeypatch.setattr(server.webbrowser, "open", look)
    with server._browser("http://127.0.0.1:1/?token=secret", True):
        assert seen.wait(20)
    assert "secret" not in opened[0][0] and "secret" in opened[0][1]
    assert not Path(opened[0][0].removeprefix("file://")).exists()


def test_wrong_ports_and_folders_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["explore", str(run), "--port", str(port)]) == 2
        assert f"--port {port}: cannot be had" in capsys.readouterr().err
    assert cli.main(["explore", str(run), "--port", "70000"]) == 2 and "is no port" in capsys.readouterr().err
    assert cli.main(["explore", str(tmp_path)]) == 2 and "no run here" in capsys.readouterr().err
    assert cli.main(["explore", str(run), str(run)]) == 2 and "given twice" in capsys.readouterr().err


def test_several_runs_and_servers_side_by_side(run: Path, finished_run: Path) -> None:
    both = server.open_server([run, finished_run])
    other = server.open_server([run])
    try:
        assert both.server_port != other.server_port and gate.cookie_name(both.token) != gate.cookie_name(other.token)
        assert [desk.path for desk in both.desks] == [run, finished_run]
        assert json.loads(GET["about"](both.desks[1], {}).body)["maps"][1][0] == "pc:1"
    finally:
        for opened in (both, other):
            opened.server_close()
            for desk in opened.desks:
                desk.close()


def test_what_is_served_is_what_is_listed() -> None:
    """No page names anything outside, nothing runs text as a program, and every library has its licence."""
    folder = Path(server.__file__).parent
    listed = (folder / "vendor" / "README.txt").read_text()
    for path in (folder / "vendor").iterdir():
        assert path.name == "README.txt" or path.name in listed
        assert "new Function" not in (text := path.read_text()) and "eval(" not in text
    assert "MIT" in listed and "Copyright" in (folder / "vendor" / "three.LICENSE.txt").read_text()
    for path in (folder / "page").iterdir():
        text = path.read_text()
        assert not [word for word in text.split() if "://" in word and "www.w3.org" not in word], path.name
        assert "eval(" not in text and "innerHTML" not in text and " style=" not in text and ' onclick="' not in text
    assert set(POST) == {"selection", "export", "analyze", "movie"}


# --- bodies that move ---


@pytest.fixture(scope="module")
def hinged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as if its halves in x turned against each other about z, by -20 to 20 degrees, with classes of that."""
    folder = tmp_path_factory.mktemp("hinged") / "run"
    shutil.copytree(run, folder)
    weights, codes = (load_tensors(folder / f"{name}.2.pkl") for name in ("weights", "z"))
    mean, power = weights["model"]["mean"], torch.ones(run_grid(run).working_box // 2 + 1)
    x = centred_coordinates(mean.shape[-1])[..., 0]
    bodies = with_joints(soft_bodies(torch.stack([x - 1.0, 1.0 - x]), 1.0), mean, (0, 1))
    motion = torch.zeros(PARTICLES, 12)
    motion[:, 2] = torch.linspace(-20, 20, PARTICLES).deg2rad()
    model = BodyModel(bodies, mean, weights["model"]["components"], motion.T @ motion / PARTICLES, power, mean)
    still = torch.zeros(PARTICLES)
    motions = Motions(motion, codes["mu"], still, torch.ones(PARTICLES, 2))
    result = BodyResult(("left", "right"), model, motions, motion, still, 2)
    save_tensors(folder / "weights.2.pkl", weights | {"bodies": result.state()})
    y, spread = result.conformation
    save_tensors(folder / "z.2.pkl", codes | {"multi_mu": y, "multi_sigma": spread})
    classes = folder / "defanalyze.2" / "kmeans2"
    save_pickle(classes / "labels.pkl", (y[:, 0] > 0).long().numpy())
    (classes / "centers.txt").write_text("-1 0\n1 0\n")
    return folder


def run_grid(run: Path) -> Any:
    return open_run(run).grid


def test_conformations_are_columns_and_a_particles_map_is_moved(hinged: Path) -> None:
    desk, opened = Desk(hinged), open_run(hinged)
    about = json.loads(GET["about"](desk, {}).body)
    headings = {name: column["heading"] for name, column in about["columns"].items()}
    assert headings["y:1"] == headings["angle:1"] == "Bodies" and "y:2" not in headings  # which moves nothing
    view = desk.view({})
    angle = view.column("angle:1")[0]
    assert np.abs(np.abs(angle) - np.abs(np.linspace(-20, 20, PARTICLES))).max() < 1e-2
    assert abs(np.corrcoef(angle, view.column("y:1")[0])[0, 1]) > 0.999
    density = torch.from_numpy(opened.decode(opened.codes[[3]]))
    y = torch.from_numpy(opened.conformation[[3]])
    moved = opened.bodies.model.bodies.move(density, y @ opened.bodies.model.modes(2)[0].T)[0].numpy()
    found = desk.map(view, {"at": "row:3"})[0]
    assert np.allclose(found, moved, atol=1e-5) and np.abs(found - density[0].numpy()).max() > 0.1 * density.max()
    ends = [desk.map(view, {"at": "motion:1", "i": i})[0] for i in ("0", "9")]
    assert np.abs(ends[0] - ends[1]).max() > 0.1 * density.max()
    desk.close()


def test_maps_of_conformations_are_those_of_the_commands(hinged: Path, tmp_path: Path) -> None:
    desk = Desk(hinged)
    view = desk.view({})
    for at, i in (("motion:1", 7), ("path:3-40-11", 5), ("class:conformation.kmeans2:1", 0)):
        volume, _, command = desk.map(view, {"at": at, "i": str(i)})
        out = tmp_path / at.partition(":")[0]
        assert cli.main([*command.split()[1:], "-o", str(out)]) == 0
        with mrcfile.open(out / f"reference{i if i else 1}.mrc") as written:
            assert np.allclose(written.data, volume, atol=1e-5), at
    assert "--codes joint --path 3 40 11" in desk.map(view, {"at": "path:3-40-11"})[2]
    desk.close()
    before = View(hinged, 1)  # when no body was known
    for at, words in (("class:joint.kmeans2:0", "no bodies"), ("motion:1", "--masks")):
        with pytest.raises(UserError, match=words):
            before.place(at)
