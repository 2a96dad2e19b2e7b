"""Copy the files next to a checkpoint's weights."""

import shutil
from pathlib import Path

from megatron_dmc.errors import CheckpointError


def copy_companion(file: Path, target: Path) -> None:
    """Copy a file of a checkpoint's folder.

    A link may lead elsewhere in its folder, or, in the Hugging Face Hub's cache, to the blobs that the
    snapshots there link to.

    Raises:
        CheckpointError: it is a link to another place. A folder from a stranger could have any file of
            this machine copied that way, and passed on with the result.
    """
    folder, leads_to = file.parent.resolve(), file.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if not any(leads_to.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{file}: is a link to {leads_to}, outside of its folder; put a copy of the file there instead"
        )
    shutil.copyfile(leads_to, target)
