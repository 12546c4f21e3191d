import numpy as np
import pytest
from PIL import Image

from detr.draw import PALETTE, TRUTH, class_colours, draw_detections, draw_truth_and_detections


def grey(width, height):
    return Image.new("RGB", (width, height), (90, 90, 90))


def has(image, colour):
    return bool((np.asarray(image) == colour).all(axis=-1).any())


def test_small_images_are_enlarged_and_boxes_with_them():
    drawn = draw_detections(grey(128, 64), [[32, 16, 96, 48]], ["cat"], [0.9], [(255, 0, 0)])
    assert drawn.size == (480, 240)
    red = np.argwhere((np.asarray(drawn) == (255, 0, 0)).all(axis=-1))
    assert red[:, 1].min() == 120 and abs(red[:, 1].max() - 360) <= 1  # columns: 32 and 96, times 3.75
    assert abs(red[:, 0].max() - 180) <= 1  # the lowest row; the tag may stand above the box


def test_large_images_keep_their_size_and_the_given_one_stays_as_it_was():
    image = grey(640, 480)
    drawn = draw_detections(image, [[10, 50, 600, 400]], ["cat"])
    assert drawn.size == (640, 480) and drawn is not image
    assert image.getcolors() == [(640 * 480, (90, 90, 90))]
    assert has(drawn, PALETTE[0])


def test_nothing_found_leaves_the_picture():
    drawn = draw_truth_and_detections(grey(640, 480), [], [], np.zeros((0, 4)), [], [])
    assert drawn.getcolors() == [(640 * 480, (90, 90, 90))]


def test_boxes_at_and_beyond_the_edge_and_inverted_ones_are_drawn():
    boxes = [[-50, -50, 20, 20], [600, 470, 900, 900], [300, 300, 200, 200], [50, 50, 50, 50]]
    assert draw_detections(grey(640, 480), boxes, ["a long name"] * 4, [0.5] * 4).size == (640, 480)


def test_the_truth_is_named_only_where_it_was_not_found():
    truth, tag = [[100, 100, 300, 300]], (slice(303, 312), slice(101, 104))  # left end of the word's ground
    found = draw_truth_and_detections(grey(640, 480), truth, ["cat"], [[105, 100, 300, 305]], ["cat"], [0.8])
    missed = draw_truth_and_detections(grey(640, 480), truth, ["cat"], [[105, 100, 300, 305]], ["dog"], [0.8])
    assert has(found, TRUTH[0]) and has(found, TRUTH[1])
    assert not has(np.asarray(found)[tag], TRUTH[1])
    assert has(np.asarray(missed)[tag], TRUTH[1])


def test_a_name_has_one_colour_in_all_pictures():
    colours = class_colours(["RBC", "WBC", "Platelets"])
    assert len(set(colours.values())) == 3
    drawn = draw_truth_and_detections(grey(500, 500), [], [], [[9, 60, 99, 99]], ["WBC"], [0.5], colours)
    assert has(drawn, colours["WBC"]) and not has(drawn, colours["RBC"])


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(ValueError):
        draw_detections(grey(640, 480), [[0, 0, 9, 9]], ["a", "b"])
    with pytest.raises(ValueError):
        draw_detections(grey(640, 480), [[0, 0, 9, 9]], ["a"], [0.5, 0.4])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_is_drawn_on(mode):
    assert draw_detections(Image.new(mode, (600, 100)), [[10, 40, 80, 90]], ["x"]).mode == "RGB"
