import pytest
import torch

from pml_compat import gallery, serving


def test_mixed_gallery_is_found_where_it_was():
    with pytest.warns(
        DeprecationWarning, match=r"pml_compat\.gallery\.MixedGallery has moved: from pml_compat\.serving"
    ):
        from pml_compat.gallery import MixedGallery
    assert MixedGallery is serving.MixedGallery
    assert MixedGallery(2, None, (10.0, -5.0), (20.0, -15.0)).old_rows(torch.eye(2)).shape == (2, 4)


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match=r"module 'pml_compat\.gallery' has no attribute 'QueryBlend'"):
        _ = gallery.QueryBlend
