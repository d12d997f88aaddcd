"""What label values and colours mean."""

import numpy as np
import pytest

from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.labelled.labelcode import LabelCode, class_list


def test_label_values_become_class_indices(tmp_path):
    where = tmp_path / "m.png"
    raw = np.array([[[10, 20], [255, 20]]], np.uint8)
    code = class_list("10=land,20=water").code
    assert code.decode(raw, 2, where).tolist() == [[0, 1], [255, 1]]
    with pytest.raises(LabelError, match=r"m.png: label value\(s\) 10, 20 belong to no class"):
        LabelCode().decode(raw, 2, where)
    assert LabelCode(threshold=128).decode(raw, 2, where).tolist() == [[0, 0], [1, 0]]


def test_colours_become_class_indices_even_after_jpeg(tmp_path):
    (tmp_path / "classes.csv").write_text("road,110,193,228\nwater,226,169,41\nunlabelled,0,0,0\n")
    classes = class_list(str(tmp_path / "classes.csv"))
    assert classes.names == ("road", "water")
    assert classes.colours == ((110, 193, 228), (226, 169, 41))
    raw = np.array([[[112, 224]], [[190, 170]], [[230, 39]]], np.uint8)
    assert classes.code.decode(raw, 2, tmp_path).tolist() == [[0, 1]]
    assert classes.code.decode(np.zeros((3, 1, 1), np.uint8), 2, tmp_path).tolist() == [[255]]
    with pytest.raises(LabelError, match="has 1 band"):
        classes.code.decode(raw[:1], 2, tmp_path)


def test_class_lists_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "c.csv").write_text("road,1\nwater,x\n")
    with pytest.raises(LabelError, match="water,x has 'x' where a number belongs"):
        class_list(str(tmp_path / "c.csv"))
    (tmp_path / "c.csv").write_text("road,1\nwater\n")
    with pytest.raises(LabelError, match="write every class as"):
        class_list(str(tmp_path / "c.csv"))
