"""opustomo: structural heterogeneity of macromolecules from cryo-electron tomography.

For scripts: the names below, of ``opustomo.api``; docs/api.md has an example.
"""

TYPE_CHECKING = False  # type checkers know the name; typing itself takes longer to load than all of this
if TYPE_CHECKING:
    from opustomo.api import (
        estimate_noise,
        observe,
        open_run,
        read_inputs,
        read_particles,
        read_volume,
        write_map,
        write_particles,
        write_volume,
    )
    from opustomo.errors import UserError

__version__ = "0.1.0"
__all__ = [
    "UserError",
    "estimate_noise",
    "observe",
    "open_run",
    "read_inputs",
    "read_particles",
    "read_volume",
    "write_map",
    "write_particles",
    "write_volume",
]


def __getattr__(name: str) -> object:
    """The names above, loaded when one is used: the command line asks for none of them, and torch takes a second."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from opustomo import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
