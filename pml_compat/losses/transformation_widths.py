"""Whether transformations fit the two spaces that they stand between."""

from __future__ import annotations

from ..transformations import Transformation


def check_widths(
    forward: Transformation | None, backward: Transformation | None, old_width: int, new_width: int | None
) -> None:
    """Raise a ValueError where a map is of other widths, or where there is none between spaces of two widths.

    ``new_width`` None: the task loss does not say how wide its embeddings are.
    """
    for transformation, name, widths in (
        (forward, "forward_transformation", (old_width, new_width)),
        (backward, "backward_transformation", (new_width, old_width)),
    ):
        if transformation is None:
            continue
        if not isinstance(transformation, Transformation):
            raise ValueError(
                f"{name} must be one of pml_compat.transformations (or a subclass of its Transformation), "
                f"got {type(transformation).__name__}"
            )
        if transformation.side_features is not None:
            raise ValueError(f"{name} must take no side-information, a class centre has none")
        got = transformation.in_features, transformation.out_features
        if any(want not in (None, have) for want, have in zip(widths, got, strict=True)):
            raise ValueError(f"{name} must map width {widths[0]} to {widths[1]}, got {got[0]} to {got[1]}")
    if forward is None and backward is None and new_width not in (None, old_width):
        raise ValueError(
            f"centers must be {new_width} wide like the new embeddings, got width {old_width}; pass "
            f"backward_transformation=LinearTransformation({new_width}, {old_width}), which maps new queries into the "
            f"old space, or forward_transformation=LinearTransformation({old_width}, {new_width}), which maps the "
            "stored gallery into the new one (or another of pml_compat.transformations)"
        )
