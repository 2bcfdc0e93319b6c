"""The configurations of maskx by name, also where only the installed package is at hand."""

import difflib
from pathlib import Path

import maskx

__all__ = ["get_config_file"]


def get_config_file(name: str) -> str:
    """Return the path of a configuration, for ``cfg.merge_from_file`` or ``LazyConfig.load``.

    Args:
        name: below `configs`, such as "MaskX/voc2nonvoc/e2e/clsbox_2_layer_R_50_FPN_1x.yaml".

    Raises:
        FileNotFoundError: there is none of that name.
    """
    package = Path(maskx.__file__).parent
    # Beside the package in a checkout, inside it where it is installed.
    folders = [package.parent / "configs", package / "configs"]
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    found = [(folder, p) for folder in folders for p in folder.rglob("*.*")]
    names = [str(p.relative_to(f)) for f, p in found if p.suffix in (".yaml", ".py")]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
    raise FileNotFoundError(
        f"There is no configuration '{name}'. Names are relative to the folder configs; near are "
        f"{', '.join(near) or 'none'}."
    )
