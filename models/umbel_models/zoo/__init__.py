"""Models for the docs, the demo and the tests, and the compiled bundles that come with the package.

`bundle_path` needs no torch; the modules beside it, which say what each model is, do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from umbel.errors import NotFound

BUNDLES: Final = Path(__file__).parent / "bundles"


def bundle_path(name: str) -> Path:
    """The folder of a compiled bundle that comes with the package, such as "smartwatch".

    Raises:
        NotFound: no bundle of this name comes with the package.
    """
    packaged = sorted(path.parent.name for path in BUNDLES.glob("*/manifest.json"))
    if name not in packaged:
        raise NotFound(f"no bundle {name!r} comes with umbel; these do: {', '.join(packaged) or 'none'}")
    return BUNDLES / name
