"""How the page of ``opustomo explore`` bears a million particles, and the server 32 decodes at once.

    python benchmarks/explore.py [-n 1000000] [--markdown docs/benchmarks.md]           (make bench-explore)

Simulated codes of 12 dimensions (24 groups), an untrained network of the default size, no subtomograms; Debian's
Chromium without a screen, WebGL on the processor.  Times are the browser's own.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import yaml
from scipy.spatial.transform import Rotation

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from headless import Page, served, why_not
from opustomo.analysis.axes import as_text
from opustomo.analysis.latents import analysis_folder, cluster, principal_components
from opustomo.checkpoint import open_run
from opustomo.data.atomic import write_text
from opustomo.data.pickles import save_pickle, save_poses
from opustomo.data.tensors import save_tensors
from opustomo.explore.gate import cookie_name
from opustomo.model.vae import Vae
from opustomo.physics.grid import Grid
from opustomo.physics.volume import spherical_mask

GRID, ZDIM = Grid(128, 3.0, 64, 48, 64), 12
Row = tuple[str, str, str]


def make_run(folder: Path, particles: int) -> None:
    """A finished run of that many particles, with k-means classes and a plane in place of UMAP."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 3, (24, ZDIM))
    codes = (centres[rng.integers(24, size=particles)] + rng.normal(0, 0.8, (particles, ZDIM))).astype(np.float32)
    mask = spherical_mask(GRID.crop, 20, 3)
    components = torch.from_numpy(rng.normal(0, 0.05, (ZDIM, *mask.shape)).astype(np.float32)) * mask
    sizes = {"templateres": 64, "width": 0.25, "encoderres": 0}
    torch.manual_seed(0)
    model = Vae(mask, mask.clone(), components, mask, **sizes)
    weights = {"kind": "network", "epoch": 0, "model": model.state_dict(), "shape": sizes, "grid": list(GRID)}
    save_tensors(folder / "weights.0.pkl", weights)
    rotation = np.tile(Rotation.random(1000, random_state=0).as_matrix(), (particles // 1000 + 1, 1, 1))[:particles]
    save_poses(folder / "pose.0.pkl", rotation, np.zeros((particles, 3)), np.zeros((particles, 3)))
    mu = torch.from_numpy(codes)
    save_tensors(folder / "z.0.pkl", {"mu": mu, "sigma": torch.full_like(mu, 0.3), "nn": torch.zeros(0, 0)})
    names = ("box", "pixel_size", "working_box", "crop", "templateres")
    config = {
        "kind": "network", "star": str(folder / "particles.star"), "particles": particles, "bfactor": 0.0,
        "epochs": 1, "valfrac": 0.1, "identity": "0" * 64, **dict(zip(names, GRID, strict=True)), **sizes,
    }  # fmt: skip
    write_text(folder / "config.yaml", yaml.safe_dump(config))
    run = open_run(folder)
    labels, centre = cluster(codes.astype(np.float64), 24, 0)
    classes = analysis_folder(run) / "kmeans24"
    save_pickle(classes / "labels.pkl", labels)
    write_text(classes / "centers.txt", as_text(codes[centre]))
    write_text(classes / "centers_ind.txt", as_text(centre, "%d"))
    plane = principal_components(codes[:, :6].astype(np.float64)).scores[:, :2]
    save_pickle(classes.parent / "umap.pkl", plane.astype(np.float32))


def page(link: str, particles: int) -> list[Row]:
    """First paint, colours and the lasso."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        shown = Page(Path(profile))
        try:
            shown.open(link)
            shown.wait(lambda: shown.times("map-shown"))
            first = shown.times("first-points")[0]["start"]
            map_at = shown.times("map-shown")[0]["start"]
            shown.click("[data-tool=lasso]")
            around = [(0.5 + 0.3 * np.cos(a), 0.55 + 0.3 * np.sin(a)) for a in np.linspace(2, 8.2, 60)]
            for i in range(5):
                shown.drag("points", around)
                shown.wait(lambda i=i: len(shown.times("lasso")) > i)
            lasso, choice = (
                sorted(entry["duration"] for entry in shown.times(n))[2] for n in ("lasso", "lasso-choice")
            )
            chosen = shown.text("count")
            frames = "const t = performance.now(), e = document.getElementById('colour'); e.value = 'density';"
            frames += "e.dispatchEvent(new Event('change')); await new Promise(d => requestAnimationFrame(() => "
            frames += "requestAnimationFrame(d))); return performance.now() - t"
            colour = shown.driver.execute_script(f"return (async () => {{{frames}}})()")
            complaints = shown.complaints()
        finally:
            shown.close()
    assert not complaints and re.match(r"[\d,]+ selected", chosen), (complaints, chosen)
    return [
        (f"first paint of {particles:,} codes, from the click on the link", f"{first / 1000:.2f} s", "< 3 s"),
        ("... and of the first decoded map", f"{map_at / 1000:.2f} s", ""),
        (f"lasso: {chosen}, median of five", f"{choice / 1000:.2f} s", "< 0.5 s"),
        ("... until the second frame after it", f"{lasso / 1000:.2f} s", "< 0.5 s"),
        ("colour by density, to the second frame", f"{colour / 1000:.2f} s", ""),
    ]


def resident() -> float:
    """MB of memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def decodes(server: object, count: int = 32) -> list[Row]:
    """That many different maps asked for at once."""
    before, most, begun, over = resident(), 0.0, time.monotonic(), threading.Event()

    def sample() -> None:
        nonlocal most
        while not over.wait(0.01):
            most = max(most, resident())

    headers = {"Cookie": f"{cookie_name(server.token)}={server.token}"}  # type: ignore[attr-defined]

    def ask(row: int) -> int:
        link = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=300)  # type: ignore[attr-defined]
        link.request("GET", f"/api/0/map?at=row:{row}", headers=headers)
        return len(link.getresponse().read())

    with ThreadPoolExecutor(count + 1) as pool:
        pool.submit(sample)
        assert min([future.result() for future in [pool.submit(ask, row) for row in range(count)]]) > 4 * GRID.crop**3
        over.set()
    spent, more = time.monotonic() - begun, most - before
    return [(f"{count} decodes of {GRID.crop}³ at once", f"{spent:.1f} s", ""),
            ("memory that they add at most, of server and askers", f"{more:.0f} MB", "bounded"),
            ("memory of the server then", f"{before:.0f} MB", "")]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=1_000_000)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        run.mkdir()
        make_run(run, given.n)
        with served(run) as (server, link):
            server.desks[0].warm()  # as the verb does while the link is being clicked
            rows = page(link, given.n)
            rows += decodes(server)
    rows.append(("load of the machine (its two cores) meanwhile", f"{os.getloadavg()[0]:.1f}", ""))
    lines = ["| what | measured | aim |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    print("\n".join(lines))
    if given.markdown:
        text = given.markdown.read_text()
        head, rest = text.split("<!-- explore -->\n")
        tail = rest.split("<!-- end of explore -->")[1]
        given.markdown.write_text(f"{head}<!-- explore -->\n" + "\n".join(lines) + f"\n\n<!-- end of explore -->{tail}")


if __name__ == "__main__":
    main()
