"""How the page of ``opustomo explore`` bears a million particles, and the server 32 decodes at once.

    python benchmarks/explore.py [-n 1000000] [--markdown docs/benchmarks.md]           (make bench-explore)

Simulated codes of 12 dimensions (24 groups), an untrained network of the default size, a STAR file of 16 columns, no
subtomograms; Debian's Chromium without a screen, WebGL on the processor.  Times are the browser's own.
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
from typing import Any

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
from opustomo.explore.answers import about, columns
from opustomo.explore.gate import cookie_name
from opustomo.model.vae import Vae
from opustomo.physics.grid import Grid
from opustomo.physics.volume import spherical_mask

GRID, ZDIM = Grid(128, 3.0, 64, 48, 64), 12
STAR_COLUMN = "star:rlnAngleTilt"
Row = tuple[str, str, str]


def make_run(folder: Path, particles: int) -> None:
    """A finished run of that many particles, with k-means classes and a plane in place of UMAP."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 3, (24, ZDIM))
    codes = (centres[rng.integers(24, size=particles)] + rng.normal(0, 0.8, (particles, ZDIM))).astype(np.float32)
    mask = spherical_mask(GRID.crop, 20, 3)
    components = torch.from_numpy(rng.normal(0, 0.05, (ZDIM, *mask.shape)).astype(np.float32)) * mask
    sizes: dict[str, Any] = {"templateres": 64, "width": 0.25, "encoderres": 0}
    torch.manual_seed(0)
    model = Vae(mask, mask.clone(), components, mask, **sizes)
    weights = {"kind": "network", "epoch": 0, "model": model.state_dict(), "shape": sizes, "grid": list(GRID)}
    save_tensors(folder / "weights.0.pkl", weights)
    rotation = np.tile(Rotation.random(1000, random_state=0).as_matrix(), (particles // 1000 + 1, 1, 1))[:particles]
    save_poses(folder / "pose.0.pkl", rotation, np.zeros((particles, 3)), np.zeros((particles, 3)))
    mu = torch.from_numpy(codes)
    save_tensors(folder / "z.0.pkl", {"mu": mu, "sigma": torch.full_like(mu, 0.3), "nn": torch.zeros(0, 0)})
    names = ("box", "pixel_size", "working_box", "crop", "templateres")
    write_star(folder / "particles.star", particles)
    config = {
        "kind": "network", "star": str(folder / "particles.star"), "particles": particles, "bfactor": 0.0,
        "epochs": 1, "valfrac": 0.1, "estpose": True, **dict(zip(names, GRID, strict=True)), **sizes,
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


def write_star(path: Path, particles: int) -> None:
    """A table as RELION 3.1 writes it, of 200 tomograms."""
    rng = np.random.default_rng(1)
    axes = [f"rln{name}" for name in ("CoordinateX", "CoordinateY", "CoordinateZ", "AngleRot", "AngleTilt", "AnglePsi",
            "OriginXAngst", "OriginYAngst", "OriginZAngst", "NormCorrection", "MaxValueProbDistribution")]  # fmt: skip
    columns = ["rlnMicrographName", *axes, "rlnOpticsGroup", "rlnRandomSubset", "rlnImageName", "rlnCtfImage"]
    numbers = rng.uniform(0, 900, (particles, len(axes)))
    with path.open("w") as file:
        file.write("data_optics\n\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n_rlnImageSize\n1 3.0 128\n\n")
        file.write("data_particles\n\nloop_\n" + "".join(f"_{name}\n" for name in columns))
        for i, (row, tomogram) in enumerate(zip(numbers, rng.integers(200, size=particles), strict=True)):
            words = " ".join([f"{value:.6f}" for value in row])
            name = f"sub/TS_{tomogram:03d}/{i:07d}"
            file.write(f"TS_{tomogram:03d} {words} 1 {1 + i % 2} {name}.mrc {name}_ctf.mrc\n")


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

                def lassoed(count: int = i) -> bool:
                    return len(shown.times("lasso")) > count

                shown.wait(lassoed)
            lasso, choice = (
                sorted(entry["duration"] for entry in shown.times(n))[2] for n in ("lasso", "lasso-choice")
            )
            chosen = shown.text("count")
            shown.wait(lambda: shown.js(f"document.querySelector('#colour option[value=\"{STAR_COLUMN}\"]') !== null"))
            density, star = (coloured(shown, name) for name in ("density", STAR_COLUMN))
            complaints = shown.complaints()
        finally:
            shown.close()
    assert not complaints and re.match(r"[\d,]+ selected", chosen), (complaints, chosen)
    return [
        (f"first paint of {particles:,} codes, from the click on the link", f"{first / 1000:.2f} s", "< 3 s"),
        ("... and of the first decoded map", f"{map_at / 1000:.2f} s", ""),
        (f"lasso: {chosen}, median of five", f"{choice / 1000:.2f} s", "< 0.5 s"),
        ("... until the second frame after it", f"{lasso / 1000:.2f} s", "< 0.5 s"),
        ("colour by density, to the second frame", f"{density / 1000:.2f} s", ""),
        ("colour by a column of the STAR file, the first time", f"{star / 1000:.2f} s", "< 5 s"),
    ]


def coloured(shown: Page, name: str) -> float:
    """Milliseconds from choosing a colour to the second frame with it."""
    shown.driver.set_script_timeout(120)
    return float(shown.driver.execute_async_script(
        "const [name, done] = arguments, menu = document.getElementById('colour'), begun = performance.now();"
        "const legend = document.getElementById('legend'), frame = requestAnimationFrame;"
        "new MutationObserver(() => frame(() => frame(() => done(performance.now() - begun))))"
        "  .observe(legend, { childList: true });"
        "menu.value = name; menu.dispatchEvent(new Event('change'));", name))  # fmt: skip


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
            desk, begun = server.desks[0], time.monotonic()  # as the verb does while the link is being clicked
            about(desk, {})
            opened = time.monotonic()
            columns(desk, {})
            read = time.monotonic()
            rows = [("to open the run, which begins with the verb", f"{opened - begun:.1f} s", ""),
                    ("... and to read its STAR file, meanwhile", f"{read - opened:.1f} s", ""),
                    *page(link, given.n)]  # fmt: skip
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
