"""What the page is answered: one function for each address below /api/N/, N being the run's number.

Owns: the form of an answer: JSON, a file, or a packet: the length of a JSON header (uint32), the header, and arrays.
"""

from __future__ import annotations

import json
import math
import shlex
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from opustomo.analysis import latents, movie, picked, selection
from opustomo.analysis.plots import class_colours, slice_limits
from opustomo.analysis.report import read_metrics
from opustomo.analysis.surface import contour
from opustomo.analysis.volumes import MapFiles, save_volumes
from opustomo.checkpoint import epochs_of
from opustomo.config import AnalyzeConfig, SelectConfig
from opustomo.data.atomic import exclusive
from opustomo.errors import UserError
from opustomo.explore.columns import Column
from opustomo.explore.gate import LARGE, SMALL, Refused
from opustomo.explore.view import Place, View
from opustomo.explore.work import Decoder, Jobs
from opustomo.physics.volume import fourier_shell_correlation
from opustomo.status import in_words, status_of
from opustomo.stored import read_config

EPOCHS = 2  # opened at a time
CURVE = 600  # rows of metrics that are sent
Query = Mapping[str, str]


class Reply(NamedTuple):
    """An answer; name: of the file as which a browser keeps it, "" where it is not to."""

    body: bytes
    kind: str = "application/json"
    name: str = ""


def as_json(value: Any) -> Reply:
    """JSON; numbers that are not finite become null."""
    return Reply(json.dumps(_finite(value)).encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def packet(header: dict[str, Any], *arrays: NDArray[Any]) -> Reply:
    """A header and arrays of float32 or uint32, little-endian, one after the other."""
    text = json.dumps(_finite(header)).encode()
    text += b" " * (-len(text) % 4)
    body = b"".join(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays)
    return Reply(len(text).to_bytes(4, "little") + text + body, "application/octet-stream")


def number(query: Query, name: str, usual: int | None = None) -> int:
    """A whole number of a query; Refused where it is none."""
    text = query.get(name, "" if usual is None else str(usual))
    if not (text.removeprefix("-").isdigit() and text.isascii() and len(text) < 10):
        raise Refused(400, f"{name}={text[:40]}: a whole number is needed")
    return int(text)


class Desk:
    """One run: the epochs that are open, its decoder and its jobs."""

    def __init__(self, path: Path, decoder: Decoder | None = None) -> None:
        self.path, self.decoder, self.jobs = path, decoder or Decoder(), Jobs()
        self._views: OrderedDict[int, View] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Give up what has not begun."""
        self.decoder.close()
        self.jobs.close()

    def warm(self) -> None:
        """Open the run before the page asks for it; what is wrong with it the page is told."""
        with suppress(UserError):
            about(self, {})
            columns(self, {})

    def view(self, query: Query) -> View:
        """The run at the epoch asked for (the latest, where none is)."""
        epoch = number(query, "epoch", -1)
        epoch = max(epochs_of(self.path), default=-1) if epoch < 0 else epoch
        with self._lock:
            if epoch not in self._views:
                self._views[epoch] = View(self.path, epoch)
                while len(self._views) > EPOCHS:
                    self._views.popitem(last=False)
            self._views.move_to_end(epoch)
            return self._views[epoch]

    def map(self, view: View, query: Query, at: str = "at", i: str = "i") -> tuple[NDArray[np.float32], str, str]:
        """A decoded map (C, C, C), its title, and the command that makes it."""
        place, index = view.place(query.get(at, ""), number(query, "n", 10)), number(query, i, 0)
        if not 0 <= index < len(place.codes):
            raise Refused(400, f"{i}={index}: there are maps 0 to {len(place.codes) - 1}")
        return self.decoded(place, index), place.titles[index], self.told(view, place.command)

    def decoded(self, place: Place, index: int) -> NDArray[np.float32]:
        """The map (C, C, C) of one code of a place."""
        code = np.asarray(place.codes[[index]], np.float32)
        key = (place.run.epoch, place.run.analysis, code.tobytes())
        return self.decoder.get(key, lambda: place.run.decode(code)[0])

    def told(self, view: View, command: str) -> str:
        """The line of a command about the epoch that is shown."""
        earlier = view.run.epoch != max(epochs_of(self.path), default=view.run.epoch)
        return self.line(command + f" --epoch {view.run.epoch}" * (earlier and bool(command)))

    def line(self, command: str) -> str:
        """A command line about this run."""
        return command and "opustomo " + command.replace("{run}", shlex.quote(str(self.path)))


def about(desk: Desk, query: Query) -> Reply:
    """What there is, without reading the STAR file: sizes, epochs, columns, maps, selections."""
    view = desk.view(query)
    with view.lock:
        found, maps = view.look(), view.offered()
    run = view.run
    return as_json({
        "name": desk.path.resolve().name, "path": str(desk.path), "epoch": run.epoch, "epochs": epochs_of(desk.path),
        "particles": len(run.codes), "pixel": run.grid.working_pixel, "columns": _menu(found), "maps": maps,
        "selections": picked.names_in(desk.path),
    })  # fmt: skip


def columns(desk: Desk, query: Query) -> Reply:
    """What the STAR file adds to them, which may take a while to read."""
    view = desk.view(query)
    with view.reading:
        return as_json(_menu(view.star_columns))


def _menu(found: Mapping[str, Column]) -> dict[str, Any]:
    return {name: {"label": column.label, "heading": column.heading, "names": column.names}
            for name, column in found.items()}  # fmt: skip


def column(desk: Desk, query: Query) -> Reply:
    """(P,) float32, and where they are indices the names and their colours."""
    values, names = desk.view(query).column(query.get("name", ""))
    return packet({"names": names, "colours": class_colours(len(names)).tolist() if names else None}, values)


def density(desk: Desk, query: Query) -> Reply:
    """A map: (C, C, C) float32 in (z, y, x)."""
    view = desk.view(query)
    volume, title, command = desk.map(view, query)
    level, reach = contour(volume[None])
    header = {"size": volume.shape[0], "pixel": view.run.grid.working_pixel, "level": level, "reach": reach,
              "limits": slice_limits(volume[None]), "title": title, "command": command}  # fmt: skip
    return packet(header, volume)


def mrc(desk: Desk, query: Query) -> Reply:
    """The same as a file, written as ``opustomo volumes`` does."""
    view = desk.view(query)
    volume, title, _ = desk.map(view, query)
    with tempfile.TemporaryDirectory() as folder:
        path = save_volumes([volume], view.run.grid, MapFiles(Path(folder)))[0]
        return Reply(path.read_bytes(), "application/octet-stream", f"{'_'.join(title.replace(',', '').split())}.mrc")


def fsc(desk: Desk, query: Query) -> Reply:
    """Fourier shell correlation of two maps: frequencies in 1/Angstrom and values."""
    view = desk.view(query)
    maps = [torch.from_numpy(desk.map(view, query, name, f"i{name}")[0]) for name in "ab"]
    curve = np.asarray(fourier_shell_correlation(*maps), np.float64)
    frequency = np.arange(len(curve)) / (view.run.grid.crop * view.run.grid.working_pixel)
    return as_json({"frequency": frequency.tolist(), "fsc": curve.tolist()})


def nearest(desk: Desk, query: Query) -> Reply:
    """Rows (k,) uint32 of the nearest codes."""
    view = desk.view(query)
    return packet({}, view.nearest(view.checked(str(number(query, "row"))), number(query, "k")))


def particle(desk: Desk, query: Query) -> Reply:
    """Facts and pictures of a particle; every picture has its own range of grey."""
    view, row = desk.view(query), number(query, "row")
    place = view.place(f"row:{row}")
    facts, pictures = view.particle(row, lambda: desk.decoded(place, 0))
    header = facts | {"pictures": [{"title": title, "height": len(image), "width": len(image[0])}
                                   for title, image in pictures]}  # fmt: skip
    return packet(header, *(np.asarray(image, np.float32) for _, image in pictures))


def live(desk: Desk, query: Query) -> Reply:
    """How training goes: status, curves, the time of the last preview; also before the first epoch."""
    found: dict[str, Any] = {"epochs": epochs_of(desk.path), "running": False, "preview": None}
    try:
        status = status_of(desk.path)
        found |= {"running": status.state == "running", "words": in_words(desk.path, status)}
    except UserError as error:  # of older programs, or copied without its log
        found["words"] = str(error)
    metrics = read_metrics(desk.path / "metrics.csv")
    for name in ("particles", "loss", "val_elbo", "linear_val_elbo"):
        values = metrics.get(name, np.zeros(0))
        found[name] = values[:: max(1, -(-len(values) // CURVE))].tolist() if name != "val_elbo" else values.tolist()
    path = _preview(desk)
    if path is not None and path.is_file():
        found["preview"] = path.stat().st_mtime
    return as_json(found)


def _preview(desk: Desk) -> Path | None:
    with suppress(UserError):
        name = str(read_config(desk.path).get("tmp_prefix", "tmp"))
        return desk.path / f"{Path(name).name}.png"
    return None


def preview(desk: Desk, query: Query) -> Reply:
    """The picture of the last epoch."""
    path = _preview(desk)
    if path is None or not path.is_file():
        raise Refused(404, "no preview yet")
    return Reply(path.read_bytes(), "image/png")


def selected(desk: Desk, query: Query) -> Reply:
    """Rows of a selection, uint32."""
    return packet({}, picked.read_selection(desk.path, query.get("name", "")).astype(np.uint32))


def jobs(desk: Desk, query: Query) -> Reply:
    """What the jobs are doing."""
    return as_json([job.told() for job in desk.jobs.jobs.values()])


def file(desk: Desk, query: Query) -> Reply:
    """A file that a job has written, by the name that the job gave it."""
    job = desk.jobs.jobs.get(number(query, "job"))
    path = job.files.get(query.get("name", "")) if job else None
    if path is None or not path.is_file():
        raise Refused(404, "no such file of a job")
    return Reply(path.read_bytes(), "application/octet-stream", path.name)


def keep(desk: Desk, query: Query, body: bytes) -> Reply:
    """Keep rows (uint32) as a selection; the command that makes a STAR file of it."""
    if len(body) % 4:
        raise Refused(400, "rows are 32-bit numbers")
    name = query.get("name", "")
    picked.write_selection(desk.path, name, np.frombuffer(body, "<u4").astype(np.int64))
    return as_json({"selections": picked.names_in(desk.path), "command": _select_line(desk, name, False)})


def _select_line(desk: Desk, name: str, corrected: bool) -> str:
    star = shlex.quote(str(read_config(desk.path)["star"]))
    folder = shlex.quote(str(desk.path / picked.FOLDER / name))
    more = " --corrected" if corrected else ""
    return desk.line(f"select {star} --run {{run}} --selection {name}{more} -o {folder}")


def _question(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refused(400, "a JSON object is needed")
    return found


def export(desk: Desk, query: Query, body: bytes) -> Reply:
    """Job: a selection as STAR file, as ``opustomo select --selection`` writes it."""
    asked = _question(body)
    name, corrected = str(asked.get("selection", "")), asked.get("corrected") is True
    picked.read_selection(desk.path, name)
    folder = desk.path / picked.FOLDER / name
    config = SelectConfig(star=Path(str(read_config(desk.path)["star"])), run=desk.path, output=folder,
                          selection=name, corrected=corrected)  # fmt: skip

    def work() -> list[Path]:
        with exclusive(folder):
            selection.main(config)
        return [folder / "selected.star", folder / "manifest.json", *folder.glob("*_optimisation_set.star")]

    return as_json(desk.jobs.start(f"STAR file of {name}", _select_line(desk, name, corrected), work).told())


def analyze(desk: Desk, query: Query, body: bytes) -> Reply:
    """Job: classes of a selection anew, as ``opustomo analyze --selection``."""
    asked = _question(body)
    name, clusters = str(asked.get("selection", "")), asked.get("clusters")
    if type(clusters) is not int or not 1 <= clusters <= 1000:
        raise Refused(400, "clusters: a number from 1 to 1000 is needed")
    picked.read_selection(desk.path, name)
    epoch = desk.view(query).run.epoch
    config = AnalyzeConfig(run=desk.path, epoch=epoch, selection=name, clusters=clusters,
                           skip_umap=asked.get("umap") is not True)  # fmt: skip

    def work() -> list[Path]:
        latents.main(config)
        return []

    line = f"analyze {{run}} --epoch {epoch} --selection {name} --clusters {clusters}"
    line += "" if asked.get("umap") is True else " --skip-umap"
    return as_json(desk.jobs.start(f"{clusters} classes of {name}", desk.line(line), work).told())


def film(desk: Desk, query: Query, body: bytes) -> Reply:
    """Job: maps and movie of a series below RUN/explore/."""
    asked, view = _question(body), desk.view(query)
    at, points, level = str(asked.get("at", "")), asked.get("n", 10), asked.get("level")
    if type(points) is not int or not (level is None or (type(level) in (int, float) and math.isfinite(level))):
        raise Refused(400, "n: a whole number is needed, level: a number or none")
    place = view.place(at, points)
    if len(place.codes) < 2:
        raise Refused(400, f"{at}: one map is no movie; choose a component or a path")
    folder = desk.path / "explore" / f"{at.replace(':', '')}_{points}.{view.run.epoch}"

    def work() -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder):
            maps = np.stack([desk.decoded(place, i) for i in range(len(place.codes))])
            paths = save_volumes(maps, view.run.grid, MapFiles(folder))
            made = movie.write_movie(maps, view.run.grid.working_pixel, paths, folder / "reference", level)
        return [*made, *paths]

    command = place.command.replace("volumes", "movie", 1) or f"movie {shlex.quote(str(folder))}"
    line = desk.told(view, command) + ("" if level is None else f" --level {level:g}")
    return as_json(desk.jobs.start(f"movie {at}", line, work).told())


Get = Callable[[Desk, Query], Reply]
Post = Callable[[Desk, Query, bytes], Reply]
GET: dict[str, Get] = {
    "about": about, "columns": columns, "column": column, "map": density, "mrc": mrc, "fsc": fsc, "nearest": nearest,
    "particle": particle, "live": live, "preview": preview, "selection": selected, "jobs": jobs, "file": file,
}  # fmt: skip
POST: dict[str, tuple[Post, int]] = {
    "selection": (keep, LARGE), "export": (export, SMALL), "analyze": (analyze, SMALL), "movie": (film, SMALL),
}  # fmt: skip
