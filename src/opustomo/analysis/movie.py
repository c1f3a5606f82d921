"""Movies of a series of maps: surfaces from two sides and slices, one contour level and one scale for all.

Owns: the verb ``movie``: its frames, GIF and MP4, and the ChimeraX script that plays the same series.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from opustomo.analysis import plots
from opustomo.analysis.surface import FRONT, SIDE, contour, render
from opustomo.analysis.volumes import CHOICES, check_choice, folder_of
from opustomo.analysis.volumes import main as make_maps
from opustomo.config import MapChoice, MovieConfig, VolumesConfig
from opustomo.data.atomic import atomic, write_text
from opustomo.data.mrc import read_volume
from opustomo.errors import UserError
from opustomo.monitor import progress

log = logging.getLogger(__name__)

Frames = NDArray[np.uint8]  # (n, h, w, 3)
Volumes = NDArray[np.float32]
TURNS_BACK = ("pc", "axis", "conformation", "path", "between")  # series in order: played forth and back
RATE = 24  # frames a second of an MP4, which players expect; of a GIF each map is one frame
BLUE = (0.35, 0.6, 0.85)


def main(config: MovieConfig) -> None:
    """Verb ``movie``."""
    if not 1 <= config.rate <= RATE or not 64 <= config.size <= 2048:
        raise UserError(
            f"--rate {config.rate:g} --size {config.size}: give 1 to {RATE} maps a second, 64 to 2048 pixels"
        )
    if Path(config.prefix).name != config.prefix:
        raise UserError(f"--prefix {config.prefix}: is a name, not a path; -o chooses the folder")
    source = _folder(config)
    paths = series(source, config.prefix)
    volumes, pixel = read_series(paths)
    output, back = config.output or source, any(getattr(config, name) for name in TURNS_BACK)
    written = write_movie(volumes, pixel, paths, output / config.prefix, config.level, config.rate, config.size, back)
    for path in written:
        log.info("written: %s", path)


def _folder(config: MovieConfig) -> Path:
    """The folder of the maps; those of a run are made where they are not there."""
    chosen = any(getattr(config, name) for name in CHOICES)
    if not chosen:
        if (config.source / "config.yaml").is_file():
            raise UserError(f"{config.source}: is a run: say which maps, e.g. --pc 1, or give their folder")
        if not config.source.is_dir():
            raise UserError(f"{config.source}: no such folder; give the folder of the maps, or a run with --pc I")
        return config.source
    from opustomo.analysis.seen import chosen_view
    from opustomo.checkpoint import open_run

    check_choice(config, "movie")
    choice = {field.name: getattr(config, field.name) for field in fields(MapChoice)}
    folder = folder_of(chosen_view(open_run(config.source, config.epoch), config), config)
    if not (folder / f"{config.prefix}0.mrc").is_file():
        make_maps(VolumesConfig(run=config.source, prefix=config.prefix, **choice))
    return folder


def series(folder: Path, prefix: str) -> list[Path]:
    """``folder``/PREFIX<number>.mrc in the order of their numbers; UserError for fewer than two."""
    named = [(re.fullmatch(re.escape(prefix) + r"(\d+)\.mrc", path.name), path) for path in folder.iterdir()]
    found = [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]
    if len(found) < 2:
        raise UserError(
            f"{folder}: has {len(found)} maps {prefix}0.mrc, {prefix}1.mrc, ...; a movie needs two or more: make them "
            "with `opustomo volumes`, or name them with --prefix"
        )
    return found


def read_series(paths: Sequence[Path]) -> tuple[Volumes, float]:
    """The maps (n, C, C, C) and their pixel size in Angstrom; UserError where they are not of one kind."""
    read = [read_volume(path) for path in paths]
    first, pixel = read[0]
    for path, (volume, size) in zip(paths, read, strict=True):
        if volume.shape != first.shape or abs(size - pixel) > 1e-4 * pixel or len(set(volume.shape)) > 1:
            raise UserError(
                f"{path}: {volume.shape} voxels of {size:g} Angstrom where {paths[0].name} has {first.shape} of "
                f"{pixel:g}; a movie needs cubes of one size: make all with one `opustomo volumes`"
            )
        if not np.isfinite(volume).all():
            raise UserError(f"{path}: has values that are not finite; make it again with `opustomo volumes`")
    return np.stack([np.asarray(volume, np.float32) for volume, _ in read]), pixel


def write_movie(
    volumes: Volumes,
    pixel: float,
    paths: Sequence[Path],
    stem: Path,
    level: float | None = None,
    rate: float = 6.0,
    size: int = 320,
    back: bool = True,
) -> list[Path]:
    """STEM.gif, STEM.mp4 (with imageio-ffmpeg), STEM.cxc and STEM.png of ``volumes`` (n, C, C, C); the paths written.

    pixel: Angstrom; paths: of the maps, for titles and the script; level: contour of all (None: ``surface.contour``);
    rate: maps a second; size: edge of a view in pixels; back: after the last map the way back.
    UserError: a level that no map reaches.
    """
    own, reach = contour(volumes)
    level = own if level is None else level
    if not volumes.max() > level:
        raise UserError(f"--level {level:g}: the densest voxel of all maps has {volumes.max():g}; give less")
    frames = draw_frames(volumes, [path.stem for path in paths], pixel, level, reach, size)
    n = len(frames)
    order = [*range(n), *range(n - 2, 0, -1)] if back else [*range(n)]
    written = [write_gif(frames, order, stem.with_name(stem.name + ".gif"), rate)]
    written += write_mp4(frames, order * max(1, round(12 / len(order))), stem.with_name(stem.name + ".mp4"), rate)
    script = stem.with_name(stem.name + ".cxc")
    write_text(script, chimerax_script(paths, script.parent, level, rate, back))
    picture = plots.montage(volumes[:64], [path.stem for path in paths[:64]])
    return [*written, script, plots.save(picture, stem.with_name(stem.name + ".png"))]


def draw_frames(volumes: Volumes, titles: Sequence[str], pixel: float, level: float, reach: float, size: int) -> Frames:
    """One frame (h, w, 3) for each map, h and w even: front and side of the surface ``level``, slices, a scale bar.

    ``reach``: voxels from the centre that the views show, which are ``size`` pixels wide.
    """
    limits = plots.slice_limits(volumes)
    fig = Figure(figsize=(2 * size / 100, 1.78 * size / 100), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(fig)
    views = [fig.add_axes((x, 0.38, 0.5, 0.56)) for x in (0.0, 0.5)]
    below = fig.add_axes((0.02, 0.01, 0.96, 0.36))
    unit = size / 320
    title = fig.text(0.02, 0.95, "", fontsize=11 * unit, color=plots.INK, va="center")
    fig.text(0.98, 0.95, f"level {level:.3g}", fontsize=8 * unit, color=plots.MUTED, va="center", ha="right")
    bar = _round(0.5 * reach * pixel)
    wide = bar / pixel / (2 * reach) * 0.5
    fig.add_artist(plots.line((0.03, 0.03 + wide), 0.41, 1.5 * unit))
    fig.text(0.03, 0.425, f"{bar:g} Å", fontsize=8 * unit, color=plots.MUTED)
    for axes in (*views, below):
        axes.set_axis_off()
    shown: list[Any] = []
    frames = []
    for i, volume in enumerate(progress(volumes, len(volumes), "movie", "frames")):
        pictures = [render(volume, level, reach, BLUE, view, size) for view in (FRONT, SIDE)]
        pictures.append(plots.slice_strip(volume, limits))
        if not shown:
            shown = [axes.imshow(picture) for axes, picture in zip(views, pictures, strict=False)]
            shown.append(below.imshow(pictures[2], cmap="gray", vmin=0, vmax=1))
        for image, picture in zip(shown, pictures, strict=True):
            image.set_data(picture)
        title.set_text(f"{titles[i]}   ({i + 1} of {len(volumes)})")
        title.set_parse_math(False)
        canvas.draw()
        drawn = np.asarray(canvas.buffer_rgba())[..., :3]
        frames.append(drawn[: drawn.shape[0] // 2 * 2, : drawn.shape[1] // 2 * 2].copy())  # H.264 needs even sizes
    return np.stack(frames)


def _round(length: float) -> float:
    """The largest of 1, 2, 5, 10, 20, ... not above ``length``."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(max(step * power for step in (1, 2, 5) if step * power <= length * (1 + 1e-9)))


def write_gif(frames: Frames, order: Sequence[int], path: Path, rate: float) -> Path:
    """``frames`` (n, h, w, 3) in ``order``, an endless GIF with one palette for all, so that no colour flickers."""
    n, h, w, _ = frames.shape
    step = max(1, int((n * h * w / 4e6) ** 0.5))  # the palette needs no more of them
    palette = Image.fromarray(frames[:, ::step, ::step].reshape(-1, w // step + (w % step > 0), 3)).quantize(256)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first, *rest = [images[i] for i in order]
    options = {"duration": round(1000 / rate), "loop": 0, "optimize": False}
    with atomic(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=rest, **options)
    return path


def write_mp4(frames: Frames, order: Sequence[int], path: Path, rate: float) -> list[Path]:
    """``frames`` (n, h, w, 3) in ``order`` as H.264; [] and a line of the log where imageio-ffmpeg is not installed."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # without the package, or without the program that its wheel brings
        log.warning("no MP4: imageio-ffmpeg is not installed; `pip install imageio-ffmpeg` brings it")
        return []
    hold = max(1, round(RATE / rate))
    with atomic(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary), frames.shape[2:0:-1], fps=RATE, codec="libx264", quality=8, macro_block_size=2,
            output_params=["-f", "mp4", "-movflags", "+faststart"],
        )  # fmt: skip
        writer.send(None)
        for i in order:
            for _ in range(hold):
                writer.send(np.ascontiguousarray(frames[i]))
        writer.close()
    return [path]


def chimerax_script(paths: Sequence[Path], folder: Path, level: float, rate: float, back: bool) -> str:
    """Commands that open the maps as one volume series, at one level, and play it; names as seen from ``folder``."""
    beside = all(path.parent.resolve() == folder.resolve() for path in paths)
    names = " ".join(f'"{path.name if beside else path.resolve()}"' for path in paths)
    direction = "oscillate" if back else "forward"
    return "\n".join([
        "# open this file in ChimeraX; to record: movie record, vseries play #1, movie encode",
        "close session",
        f"open {names} vseries true",
        f"volume #1 style surface step 1 level {level:.6g} color #56b4e9",
        "set bgColor white",
        "lighting soft",
        "view orient",
        f"vseries play #1 loop true direction {direction} maxFrameRate {rate:g}",
        "",
    ])  # fmt: skip
