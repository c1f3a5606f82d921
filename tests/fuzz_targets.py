"""Every reader of a file that a user may bring, as a function of one file; and good files of each kind to start from.

``test_readers_hostile.py`` and ``tools/fuzz.py`` change them.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml

from atom_files import two_models
from dialect_writers import Subtomograms
from opustomo.analysis.class_quality import read_quality
from opustomo.analysis.data_maps import read_fsc
from opustomo.analysis.picked import read_selection
from opustomo.analysis.volumes import read_codes
from opustomo.config import InputOptions
from opustomo.data import pickles
from opustomo.data.cache import read_manifest
from opustomo.data.inputs import read_mask
from opustomo.data.lists import read_list
from opustomo.data.lists.write import read_sources
from opustomo.data.mrc import read_volume
from opustomo.data.readers import read_particles, read_transfer_volume
from opustomo.data.readers.ctf_star import read_tilts
from opustomo.data.star import read_star, write_star
from opustomo.data.tensors import read_arrays, read_tensors
from opustomo.errors import UserError
from opustomo.monitor import read_rows
from opustomo.simulate.atoms import read_atoms
from opustomo.stored import read_config
from stack_writers import two_states_set
from star_sets import BOX, PIXEL, Set, put_loop, relion31

COUNT = 4
CTF_CSV = b"""TiltAngle, Defocus, Voltage, Cs, Amplitude, Bfactor, Scale, DefocusDelta, AstigmatismAngle
-40.2, -2.1e-06, 300000, 0.0027, 0.07, -1.2e-19, 0.76, -4e-08, 0.5
0.7, -2.2e-06, 300000, 0.0027, 0.07, -2.4e-19, 1.00, -4e-08, 0.5
"""
LIST = b"""
data_particles

loop_
_rlnTomoName
_rlnCenteredCoordinateXAngst
_rlnCenteredCoordinateYAngst
_rlnCenteredCoordinateZAngst
_rlnAngleRot
_rlnAngleTilt
_rlnAnglePsi
_rlnOriginXAngst
_rlnRandomSubset
TS_1 1.5 2.5 -3.5 10 20 30 0.5 1
TS_1 4.5 5.5 -6.5 40 50 60 0.5 2
"""


def star(path: Path) -> None:
    """Read as a set; what can be read must survive being written."""
    blocks = read_star(path).blocks
    try:
        write_star(path.with_suffix(".out"), blocks)
    except UserError:
        return
    again = read_star(path.with_suffix(".out")).blocks
    assert list(again) == list(blocks)
    for name, block in blocks.items():
        same = again[name] == block if isinstance(block, dict) else again[name].equals(block)
        assert same, f"data_{name} is {again[name]} where {block} was written"


def particles(path: Path) -> None:
    """The same with the subtomograms of the small set beside it: what is read is what a run could use."""
    found = read_particles(path, InputOptions())
    assert np.isfinite(found.rotation).all() and np.isfinite(found.origin).all() and np.isfinite(found.tilts).all()


def within(folder: str, file: str, star: str) -> Callable[[Path], None]:
    """As particles, with the bytes in the place of one file of a set of tilt images."""

    def read(path: Path) -> None:
        path.replace(path.parent / folder / file)
        particles(path.parent / folder / star)

    return read


def mask(path: Path) -> None:
    found = read_mask(path, BOX, PIXEL)
    assert found.shape == (BOX,) * 3 and bool(torch.isfinite(found).all())


def listed(suffix: str) -> Callable[[Path], None]:
    """A particle list under the name that tells its program."""

    def read(path: Path) -> None:
        found = read_list(path.replace(path.with_name(f"list{suffix}")))
        voxels = found.voxels(np.arange(len(found)), 2.0, np.array([9, 9, 9]), None)
        assert np.isfinite(found.rotation).all() and np.isfinite(voxels).all()

    return read


def atoms(path: Path) -> None:
    """Two conformations in one file, or beside each other."""
    molecule, length = read_atoms((path,), 4.0, 2.0, True)
    beads = molecule.at(0, length / 2)
    assert all(np.isfinite(column).all() for column in (beads.centre, beads.sigma, beads.weight))
    assert np.isfinite(length) and len(beads.weight) and (beads.sigma > 0).all()


def selection(path: Path) -> None:
    """A selection by hand, in a run of that many particles."""
    run = path.parent / "picked"
    (run / "selections").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(f"particles: {COUNT}\nidentity: x\n")
    path.replace(run / "selections" / "list.json")
    assert set(read_selection(run, "list")) <= set(range(COUNT))


TARGETS: dict[str, Callable[[Path], object]] = {
    "star": star,
    "particles": particles,
    "stacks": within("set", "particles.star", "set.star"),
    "tomograms": within("other", "tomograms.star", "set.star"),
    "optimisation": within("third", "set.star", "set.star"),
    "stack": within("fourth", "stacks/0.mrcs", "set.star"),
    "pseudo": within("pseudo", "particles.star", "optimisation_set.star"),
    "series": within("flat", "flat.star", "flat.star"),
    "ctf_star": lambda path: read_tilts([path], ["p"], {}),
    "ctf_csv": lambda path: read_tilts([path.rename(path.with_suffix(".csv"))], ["p"], {}),
    "mrc": read_volume,
    "mask": mask,
    "transfer": lambda path: read_transfer_volume(path, BOX),
    "poses": pickles.load_poses,
    "indices": lambda path: pickles.load_indices(path, COUNT),
    "indices_text": lambda path: pickles.load_indices(path.rename(path.with_suffix(".txt")), COUNT),
    "split": lambda path: pickles.load_split(path, COUNT),
    "labels": pickles.load_labels,
    "pickles": lambda path: pickles.load_pickle(path),
    "tensors": read_tensors,
    "arrays": lambda path: read_arrays(path, "write it again"),
    "config": lambda path: read_config(path.rename(path.with_name("config.yaml")).parent),
    "codes": lambda path: read_codes(path, 2),
    "manifest": lambda path: read_manifest(path.rename(path.with_name("cache.json")).parent),
    "metrics": read_rows,
    "quality": read_quality,
    "fsc": read_fsc,
    "lists": listed(".star"),
    "dynamo": listed(".tbl"),
    "pytom": listed(".xml"),
    "ndjson": listed(".ndjson"),
    "m_source": read_sources,
    "atoms": atoms,
    "selection": selection,
}


def saved(save: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def seeds(folder: Path) -> dict[str, list[bytes]]:
    """Good files of every kind; ``folder`` then holds the small set they belong to."""
    old, new = Set(folder), relion31(folder / "new", groups=2)
    stars = [old.write().read_bytes(), new.write().read_bytes()]
    volume = (folder / "sub" / "p0.mrc").read_bytes()
    blob = volume[:1024] + np.clip(np.frombuffer(volume, np.float32, offset=1024), 0, 1).tobytes()
    even = volume[:1024] + np.ones((BOX,) * 3, np.float32).tobytes()
    rng = np.random.default_rng(0)
    order = rng.permutation(COUNT)
    poses = (np.tile(np.eye(3, dtype=np.float32), (COUNT, 1, 1)), np.zeros((COUNT, 3)), np.zeros((COUNT, 3), ">f4"))
    state = {"mu": torch.zeros(COUNT, 2), "epoch": 3, "shape": {"width": 0.1}, "kind": "network"}
    config = {"kind": "network", "star": "a.star", "box": 16, "pixel_size": 3.5, "estpose": True, "mask": None}
    curves = "frequency,a,random\n0.000000,1.000000,1.000000\n0.010000,0.500000,0.100000\n"
    from opustomo.analysis.class_quality import COLUMNS
    from opustomo.monitor import METRIC_COLUMNS

    pickles = {
        "poses": poses,
        "indices": [0, 2],
        "split": order,
        "labels": order,
        "pickles": {"a": {1, 2}, "b": b"x", "c": np.array(["s", None], object), "d": np.float32(1), "e": "é"},
    }
    texts = {
        "indices_text": "0\n1, 2\n",
        "config": yaml.safe_dump(config),
        "codes": "1e3 2\n# a\n3, 4\n",
        "manifest": json.dumps({"format": 3, "rows": 4, "grid": [16, 3.5, 16, 12, 16], "checksum": 0}),
        "metrics": ",".join(METRIC_COLUMNS) + "\n0" + ",1" * (len(METRIC_COLUMNS) - 1) + "\n",
        "quality": ",".join(COLUMNS) + "\n0" + ",1" * (len(COLUMNS) - 1) + "\n",
        "fsc": curves,
        "dynamo": (" ".join(map(str, range(26))) + "\n") * 2,
        "pytom": "<ParticleList><Particle><Rotation X='1' Z1='2' Z2='3'/><Shift X='0' Y='1' Z='2'/><PickPosition "
        "Origin='a.mrc' X='4' Y='5' Z='6'/><Score Value='0.5'/></Particle></ParticleList>",
        "ndjson": '{"location": {"x": 1, "y": 2.5, "z": 3}, "xyz_rotation_matrix": [[0,1,0],[-1,0,0],[0,0,1]]}\n' * 2,
        "selection": json.dumps({"name": "mine", "particles": COUNT, "identity": "x", "rows": [0, 2]}),
        "m_source": '<DataSource><Files><File Hash="0A" Name="a.tomostar" /></Files></DataSource>',
    }
    names = [
        f"wrp{name}1" for name in ("CoordinateX", "CoordinateY", "CoordinateZ", "AngleRot", "AngleTilt", "AnglePsi")
    ]
    motl = ["tomo_num", "phi", "the", "psi", *(f"orig_{a}" for a in "xyz"), *(f"{a}_shift" for a in "xyz"), "halfset"]
    put_loop(
        folder / "m.star", "", {"wrpSourceName": ["a"], "wrpRandomSubset": ["1"], **{key: ["1.5"] for key in names}}
    )
    put_loop(folder / "motl.star", "stopgap_motivelist", {key: ["2"] for key in motl})
    images = two_states_set(2, 5.0, box=16, step=40.0)
    sets = [images.write_set(folder / name) for name in ("set", "other", "third", "fourth")]
    flat = images.write_series(folder / "flat")
    pseudo = Subtomograms(images, folder / "pseudo").relion4().with_name("particles.star")
    pseudo.with_name("sub").rename(pseudo.with_name("volumes"))  # the set beside it has CTF STAR files in sub
    pseudo.write_text(pseudo.read_text().replace("sub/p", "volumes/p"))
    return {
        "atoms": [two_models().encode()],
        "stacks": [sets[0].with_name("particles.star").read_bytes()],
        "tomograms": [sets[1].with_name("tomograms.star").read_bytes()],
        "optimisation": [sets[2].read_bytes()],
        "stack": [sets[3].with_name("stacks").joinpath("0.mrcs").read_bytes()],
        "pseudo": [pseudo.read_bytes()],
        "series": [flat.read_bytes()],
        "star": stars,
        "particles": stars,
        "lists": [(folder / name).read_bytes() for name in ("m.star", "motl.star")] + [LIST],
        "ctf_star": [(folder / "sub" / "p0_ctf.star").read_bytes()],
        "ctf_csv": [CTF_CSV],
        "mrc": [volume],
        "mask": [blob],
        "transfer": [even],
        **{name: [pickle.dumps(value, protocol) for protocol in (2, 4, 5)] for name, value in pickles.items()},
        "tensors": [saved(lambda b: torch.save(state, b))],
        "arrays": [saved(lambda b: np.savez(b, a=poses[0], b=order))],
        **{name: [text.encode()] for name, text in texts.items()},
    }


def attempt(target: str, content: bytes, folder: Path) -> str | None:
    """Give a reader these bytes: None where it can use them, the message where it refuses."""
    path = folder / "hostile.star"
    path.write_bytes(content)
    try:
        TARGETS[target](path)
    except UserError as error:
        message = str(error)
        assert message.isprintable(), message
        return message
    return None
