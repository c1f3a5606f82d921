"""``opustomo check``: look at a data set in seconds and say what will be done about every finding.

Owns: the order of the questions and the exit status (0; 1 with any error).  The questions are in ``data/checks``.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import numpy as np

from opustomo.config import CheckConfig, GridOptions, InputOptions
from opustomo.data.checks import crop, hand, headers, images, premultiplied, signal, transfer, wedge
from opustomo.data.checks import particles as table
from opustomo.data.findings import Finding, Report
from opustomo.data.observe import one_thread_each, sample_rows
from opustomo.data.particles import Particles
from opustomo.data.readers import read_particles, relion
from opustomo.data.readers.files import Locator
from opustomo.data.star import read_star
from opustomo.errors import UserError
from opustomo.physics.grid import make_grid

_BAND_BOX = 32  # working box of the Fourier statistics: enough to see wedge, CTF and contrast
_TILT_SAMPLE = 32  # particles for them where tilts must be inserted, which costs; else the whole sample
_LEAST_SAMPLE, _LARGE_BOX = 16, 128  # boxes beyond are transformed in seconds: fewer are taken, but never fewer than 16


def main(config: CheckConfig) -> int:
    """Print the report; returns 1 if anything in it is an error.

    A STAR file that cannot be read as a particle set raises ``UserError`` as everywhere, after what can be said
    about its files was printed.
    """
    if config.sample < 1:
        raise UserError(f"--sample {config.sample}: at least one subtomogram must be read; leave it out for 64")
    report = examine(config)
    if report.failure is None or config.json or any(report.sections.values()):
        print(report.printed(config.json))
    if report.failure is not None:
        raise UserError(report.failure)
    if not config.json:
        print(_next_step(config, report))
    return 1 if report.count("error") else 0


def examine(config: CheckConfig) -> Report:
    """All findings about ``config.star``; never raises for a fault of the data set."""
    start = time.monotonic()
    failure = None
    try:
        with one_thread_each():
            sections = _sections(config, read_particles(config.star, config.input))
    except UserError as error:
        failure, sections = str(error), {"files": _file_findings(config.star, config.input)}
    return Report(config.star, sections, time.monotonic() - start, failure)


def _sections(config: CheckConfig, particles: Particles) -> dict[str, list[Finding]]:
    # of stacks their own names: the rows of a flat table are images
    named = [path.name for path in particles.image_files] if particles.stacks else relion.image_names(particles.star)
    names = [str(name) for name in named]
    survey = headers.survey_headers(particles.image_files, names)
    geometry = [
        *headers.box_findings(survey, particles.stacks),
        *headers.pixel_findings(survey, particles.star, particles.pixel_size),
    ]
    geometry += [*table.origin_findings(particles), *table.orientation_findings(particles)]
    picture, power = _data_findings(config, particles, names, survey)
    mask_lines, mask = crop.mask_findings(config.grid, particles.box, particles.pixel_size)
    grid_lines, grid = crop.grid_findings(config.grid, mask, particles.pixel_size)
    return {
        "particles": [
            *table.count_findings(particles),
            *table.duplicate_findings(particles),
            # the first note is the dialect; of the box all headers say more than the reader's few
            *(Finding("ok", "reader", note) for note in particles.notes[1:] if not note.startswith("box ")),
        ],
        "geometry": geometry,
        "images": picture,
        "transfer": [
            *transfer.transfer_findings(particles),
            *headers.transfer_file_findings(particles.ctf_files, particles.box),
            *power,
        ],
        "mask and crop": [*mask_lines, *grid_lines],
        "cost": crop.cost_findings(particles, grid) if grid else [],
    }


def _data_findings(
    config: CheckConfig, particles: Particles, names: list[str], survey: headers.Survey
) -> tuple[list[Finding], list[Finding]]:
    """Findings from voxels (images) and from their Fourier power (transfer), on samples spread over the file."""
    shape = (particles.box,) * (2 if particles.stacks else 3)
    fitting = {name for name, header in survey.readable if header.shape[-len(shape) :] == shape}
    candidates = np.array([i for i, name in enumerate(names) if name in fitting], np.int64)
    if len(candidates) == 0:
        return [], []
    rows = candidates[sample_rows(len(candidates), config.sample)]
    sample = images.read_sample(particles, rows, names)
    found = images.grey_findings(sample, len(particles))
    if len(sample.usable) < 2:
        return found, []
    most = _TILT_SAMPLE if particles.transfer == "tilts" else len(sample.usable)
    most = max(_LEAST_SAMPLE, int(most * min(1.0, (_LARGE_BOX / particles.box) ** 3)))
    few = particles.subset(sample.usable[sample_rows(len(sample.usable), most)])
    size = min(particles.box, _BAND_BOX)
    grid = make_grid(particles.box, particles.pixel_size, size / particles.box, particles.box / 2)
    noise = signal.noise_model(few, grid)
    if isinstance(noise, UserError):
        return found, [Finding("error", "CTF", str(noise))]
    found += signal.signal_findings(noise, few, grid, config.input)
    turned = hand.hand_findings(few, grid, noise)
    if particles.stacks:  # images have no wedge to compare with
        return found, [*premultiplied.premultiplied_findings(few, grid, noise), *turned]
    return found, [*wedge.wedge_findings(wedge.sample_power(few, grid, noise.mean_normalised)), *turned]


def _file_findings(star: Path, options: InputOptions) -> list[Finding]:
    """What can be said about the subtomograms when the set as a whole cannot be read."""
    try:
        particles = read_star(star)
        names = [str(name) for name in relion.image_names(particles)]
        stated = relion.pixel_size(particles)
        locator = Locator(star, options.datadir)
    except UserError:
        return []
    places = [locator.find([name]) for name in names]
    absent = [i for i, place in enumerate(places) if place is None]
    if len(absent) == len(names):
        return []  # nothing to add to the message that says so
    present = [(Path(place[0]), name) for place, name in zip(places, names, strict=True) if place is not None]
    survey = headers.survey_headers([path for path, _ in present], [name for _, name in present])
    stacks = relion.has_stacks(particles) or relion.has_series(particles)
    what = "stacks" if stacks else "subtomograms"
    found = [*headers.missing_findings(names, absent, what), *headers.box_findings(survey, stacks)]
    return [*found, *(headers.pixel_findings(survey, particles, stated[0]) if stated else [])]


def _next_step(config: CheckConfig, report: Report) -> str:
    if report.count("error"):
        return "mend the errors, then check again"
    mask, star = config.grid.mask, shlex.quote(str(config.star))
    typed = {
        "datadir": config.input.datadir,
        "contrast": config.input.contrast if config.input.contrast != "auto" else None,
        "format": config.input.format if config.input.format != "auto" else None,
        "normalisation": config.input.normalisation if config.input.normalisation != "auto" else None,
        "damaged": config.input.damaged if config.input.damaged != "stop" else None,
        "tilt-limit": config.input.tilt_limit,
        "mask": mask,
        "downfrac": config.grid.downfrac if config.grid.downfrac != GridOptions().downfrac else None,
    }
    flags = "".join(f" --{name} {shlex.quote(str(value))}" for name, value in typed.items() if value is not None)
    return f"next: opustomo train {star}{flags} -o run" if mask else f"next: opustomo average {star}{flags} -o average"
