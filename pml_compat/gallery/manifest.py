"""What keeps the spaces of two models apart: the manifest of a migration, read before anything is written."""

from __future__ import annotations

from urllib.parse import urlsplit

from .stores import Manifest, is_taken, read_manifest

FORMAT = "pml_compat.Manifest/1"
_FIXED = ("old", "width", "batch_size", "transformation", "normalize", "side_info", "old_model", "new_model")


def find_begun(new: str, wanted: Manifest, live: bool) -> Manifest | None:
    """Return the manifest of an earlier run that wanted the same; None where nothing stands there.

    ``live``: the old gallery may have other rows than it had.
    """
    found = read_manifest(new)
    shown = wanted["new"]
    if found is None:
        if is_taken(new):
            raise ValueError(f"new must be free, or what an earlier run has begun; something else stands at {shown!r}")
        return None
    if found.get("format") != FORMAT:
        raise ValueError(f"the manifest of {shown!r} must be of the format {FORMAT}, got {found.get('format')!r}")
    for name in _FIXED if live else (*_FIXED, "rows"):
        if found.get(name) != wanted[name]:
            raise ValueError(
                f"{shown!r} was begun with {name} {found.get(name)!r}, this run has {wanted[name]!r}; give the same, "
                "or remove it first (--rollback)"
            )
    return found


def check_model(old: str, old_model: str | None) -> None:
    """Raise a ValueError where a gallery that a migration wrote is unfinished, or of another model."""
    manifest = read_manifest(old)
    if manifest is None or manifest.get("format") != FORMAT:
        return
    shown = manifest["new"]
    if manifest["status"] != "finished":
        raise ValueError(f"old must be a whole gallery, the migration that writes {shown!r} has not finished")
    if old_model is not None and manifest["new_model"] not in (None, old_model):
        raise ValueError(
            f"{shown!r} holds vectors for the model {manifest['new_model']!r}, old_model is {old_model!r}: these are "
            "two spaces"
        )


def without_password(address: str) -> str:
    """Return an address that can be shown and kept."""
    password = urlsplit(address).password if "://" in address else None
    return address.replace(f":{password}@", ":***@") if password else address
