"""Exported files give what the model gives, at sizes other than the one they were traced at."""
from __future__ import annotations

import pytest
import torch
from test_model import ANCHORS, LEARNED, make_model, some_images

from detr import export

MODELS = {
    "learned": LEARNED.model_copy(update={"backbone": "resnet18", "norm": "frozen", "dec_layers": 1}),
    "anchors": ANCHORS.model_copy(update={"enc_layers": 0, "dec_layers": 2}),
}
SIZES = [
    [(64, 96)],
    [(33, 35)],  # the least for a stride of 32
    [(161, 95), (100, 70), (40, 93)],  # no multiple of any stride, and padded
    [(75, 210)] * 2,
]


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """The model, its trace, and a folder with both files."""
    model = make_model(MODELS[request.param]).eval()
    program, folder = export.export(model), tmp_path_factory.mktemp("export")
    for name in ("model.pt2", "model.onnx"):
        export.save(program, folder / name)
    return model, folder


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_a_file_gives_what_the_model_gives_at_any_size(exported, name):
    model, folder = exported
    run = export.load(folder / name)
    for sizes in SIZES:
        images, mask = some_images(sizes)
        with torch.no_grad():
            want = model(images, mask)
            logits, boxes = run(images, mask)
        torch.testing.assert_close(logits, want["pred_logits"], atol=2e-5, rtol=0)
        torch.testing.assert_close(boxes, want["pred_boxes"], atol=2e-6, rtol=0)


def test_a_file_is_found_out_when_it_is_not_the_models(exported):
    model, folder = exported
    run = export.load(folder / "model.onnx")
    same = export.differences(model, run)
    assert all(same[key] <= export.TOLERANCES[key] for key in export.OUTPUTS)
    other = make_model(model.config).eval()
    with torch.no_grad():
        other.class_embed.bias[1] += 0.01
    changed = export.differences(other, run)
    assert changed["pred_logits"] == pytest.approx(0.01, abs=1e-4) and changed["pred_boxes"] == same["pred_boxes"]
    with torch.no_grad():
        other.class_embed.bias[1] = torch.nan
    assert not export.differences(other, run)["pred_logits"] <= export.TOLERANCES["pred_logits"]


def test_a_file_says_nothing_of_the_machine_it_was_made_on(exported):
    _, folder = exported
    place = str(export.__file__).removesuffix("export.py").encode()
    assert not any(place in path.read_bytes() for path in folder.iterdir())


def test_sides_end_where_the_model_does():
    assert export.side_limits(make_model(MODELS["anchors"]).eval()) == (17, None)
    assert export.side_limits(make_model(MODELS["learned"]).eval()) == (33, None)
    fewest = {"position_embedding": "learned", "enc_layers": 0, "dec_layers": 1}
    model = make_model(LEARNED.model_copy(update=fewest)).eval()
    low, high = export.side_limits(model)
    assert (low, high) == (17, 800)
    run = export.export(model).module()
    with torch.no_grad():
        for side in (low, high):
            images, mask = some_images([(side, 40)])
            torch.testing.assert_close(run(images, mask)[1], model(images, mask)["pred_boxes"])
        for side in (low - 1, high + 1):
            with pytest.raises(AssertionError):
                run(*some_images([(side, 40)]))
        with pytest.raises(ValueError, match="50 x 50 cells"):
            model(*some_images([(high + 1, 40)]))


def test_a_model_in_training_is_refused():
    with pytest.raises(ValueError, match="evaluation mode"):
        export.export(make_model(ANCHORS))
