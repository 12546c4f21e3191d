import numpy as np
import pytest
from PIL import Image

from detr.draw import (
    PALETTE,
    TRUTH,
    class_colours,
    draw_decoder_attention,
    draw_detections,
    draw_encoder_attention,
    draw_queries,
    draw_truth_and_detections,
)


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


# ---------------------------------------------------------------- attention


def spot(x, y):
    """A map [6, 8] with all its attention in the cell at column x and row y."""
    weights = np.zeros((6, 8), np.float32)
    weights[y, x] = 0.7
    return weights


def brightest(panel):
    """(x, y) of the middle of the brightest spot that has a colour (words are white), as shares of the panel."""
    light = np.asarray(panel.convert("L"), float) * (np.ptp(np.asarray(panel, int), axis=-1) > 40)
    rows, columns = np.nonzero(light >= light.max() - 2)
    return (columns.mean() + 0.5) / panel.width, (rows.mean() + 0.5) / panel.height


@pytest.mark.parametrize("size", [(1600, 1200), (64, 48)])
def test_a_query_s_attention_is_bright_where_it_lies_on_the_image(size):
    weights = np.stack([spot(6, 1), spot(1, 4)])
    boxes = np.array([[0.1, 0.6, 0.4, 0.9], [0.6, 0.6, 0.9, 0.9]]) * (size * 2)
    sheet = draw_decoder_attention(grey(*size), weights, boxes, ["a", "b"], [0.9, 0.8], [(0, 0, 99), (99, 0, 0)])
    assert sheet.size == (2 * 480 + 8, 360)
    panels = sheet.crop((0, 0, 480, 360)), sheet.crop((488, 0, 968, 360))
    for panel, colour, (x, y) in zip(panels, [(0, 0, 99), (99, 0, 0)], [(6, 1), (1, 4)], strict=True):
        assert brightest(panel) == pytest.approx(((x + 0.5) / 8, (y + 0.5) / 6), abs=0.02)
        assert has(panel, colour)
    blue = np.argwhere((np.asarray(panels[0]) == (0, 0, 99)).all(axis=-1))
    assert blue[:, 1].min() == 48 and blue[:, 0].max() == pytest.approx(324, abs=1)  # its box; the second has its own
    assert not has(panels[1], (0, 0, 99))


@pytest.mark.parametrize(("number", "columns", "rows"), [(1, 1, 1), (3, 3, 1), (4, 2, 2), (12, 4, 3), (13, 4, 4)])
def test_panels_stand_in_rows(number, columns, rows):
    weights, boxes = np.ones((number, 3, 3)), np.tile([10, 10, 50, 50], (number, 1))
    sheet = draw_decoder_attention(grey(480, 480), weights, boxes, ["a"] * number, [0.5] * number)
    assert sheet.size == (columns * 488 - 8, rows * 488 - 8)


def test_without_detections_or_attention_the_image_stays():
    assert draw_decoder_attention(grey(640, 480), np.zeros((0, 3, 3)), [], [], []).size == (480, 360)
    nothing = draw_decoder_attention(grey(640, 480), np.zeros((1, 3, 3)), [[0, 0, 1, 1]], ["a"], [0.1])
    assert nothing.getpixel((300, 200)) == pytest.approx((68, 68, 68), abs=2)  # dimmed, and nothing bright on it


def test_each_point_is_marked_on_the_image_and_on_its_own_map():
    points = [[80, 60], [560, 420]]
    sheet = draw_encoder_attention(grey(640, 480), np.stack([spot(7, 0), spot(0, 5)]), points)
    assert sheet.size == (3 * 488 - 8, 360)
    whole, first, second = (sheet.crop((at, 0, at + 480, 360)) for at in (0, 488, 976))
    for (x, y), colour, own, other in zip(points, PALETTE, (first, second), (second, first), strict=False):
        place = round(x * 0.75) - 8, round(y * 0.75)  # beside the number
        assert whole.getpixel(place) == own.getpixel(place) == colour
        assert other.getpixel(place) != colour
    assert brightest(first)[0] > 0.9 and brightest(second)[0] < 0.1
    assert whole.getpixel((240, 180)) == (90, 90, 90)


def test_attention_and_boxes_of_unequal_number_are_refused():
    with pytest.raises(ValueError):
        draw_decoder_attention(grey(64, 48), np.ones((2, 3, 3)), [[0, 0, 9, 9]], ["a"], [0.5])
    with pytest.raises(ValueError):
        draw_encoder_attention(grey(64, 48), np.ones((2, 3, 3)), [[1, 1]])


def test_box_centres_stand_in_their_query_s_panel_in_the_colour_of_their_shape():
    shapes = {"green": [0.1, 0.3], "red": [0.8, 0.4], "blue": [0.2, 0.6]}
    boxes = np.zeros((1, 4, 4))
    boxes[0, :3] = [[0.25, 0.75, *shape] for shape in shapes.values()]
    boxes[0, 3] = [0.75, 0.25, *shapes["red"]]
    picture = np.asarray(draw_queries(boxes), int)
    frames = (picture == (245, 245, 242)).all(-1)  # the panels' ground
    assert frames.any()
    rows, columns = (np.flatnonzero(frames.any(axis)) for axis in (1, 0))
    pixels = picture[rows[0] : rows[-1], columns[0] : columns[-1]]
    light = pixels.max(-1) - pixels.min(-1) > 60  # the dots
    found = {}
    height, width = light.shape
    for query, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        part = np.zeros_like(light)
        part[row * height // 2 : (row + 1) * height // 2, column * width // 2 : (column + 1) * width // 2] = True
        y, x = np.nonzero(light & part)
        colour = pixels[light & part].mean(0)
        found[query] = ("red", "green", "blue")[colour.argmax()]
        share = (x.mean() / width * 2 - column, y.mean() / height * 2 - row)
        want = (0.75, 0.25) if query == 3 else (0.25, 0.75)
        assert share == pytest.approx(want, abs=0.1)
    assert found == {0: "green", 1: "red", 2: "blue", 3: "red"}


@pytest.mark.parametrize(("images", "queries"), [(0, 3), (2, 1), (3, 30)])
def test_any_number_of_queries_and_images_is_drawn(images, queries):
    boxes = np.random.default_rng(0).random((images, queries, 4))
    assert draw_queries(boxes).height > 100
