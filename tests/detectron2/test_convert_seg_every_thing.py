import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from converters.caffe2_weights import convert_caffe2_blobs, save_detectron2_checkpoint
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from settings import pairs
from torchvision.ops import roi_align

from maskx.detectron2 import get_cfg
from maskx.systems.maskx_rcnn.mask_head import MaskXHead

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "convert_seg_every_thing.py"
CAFFE2 = runpy.run_path(str(ROOT / "tests" / "support" / "caffe2_blobs.py"))
make_blobs, write_python2_pickle = CAFFE2["make_blobs"], CAFFE2["write_python2_pickle"]

# Widths of the synthetic files, as options of Detectron2.
NARROW = pairs(
    {
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.FPN.OUT_CHANNELS": 8,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 12,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 6,
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 4,
    }
)
PIXEL_MEANS = np.array([102.9801, 115.9465, 122.7717], np.float32)  # Detectron's, BGR
# XYXY, small enough for all to belong to the finest level.
BOXES = torch.tensor([[5.0, 6, 50, 40], [20, 3, 90, 60], [0, 0, 30, 63], [60, 20, 95, 44]])
CLASSES = torch.tensor([3, 0, 1, 3])  # foreground


class Caffe2Net:
    """What the authors' network computes, operator by operator and straight from the blobs."""

    def __init__(self, blobs):
        self.blobs = {name: torch.from_numpy(np.array(blob)) for name, blob in blobs.items()}

    def conv(self, x, name, stride=1, pad=0):
        weight, bias = self.blobs[f"{name}_w"], self.blobs.get(f"{name}_b")
        return F.conv2d(x, weight, bias, stride, pad)

    def affine(self, x, name):
        scale, bias = self.blobs[f"{name}_s"], self.blobs[f"{name}_b"]
        return x * scale[:, None, None] + bias[:, None, None]

    def conv_affine(self, x, name, stride=1, pad=0):
        return self.affine(self.conv(x, name, stride, pad), f"{name}_bn")

    def fc(self, x, name):
        return x.reshape(len(x), -1) @ self.blobs[f"{name}_w"].T + self.blobs[f"{name}_b"]

    def body(self, data, blocks):
        x = self.affine(self.conv(data, "conv1", 2, 3), "res_conv1_bn").relu()
        x = F.max_pool2d(x, 3, 2, 1)
        sums = {}
        for stage, count in zip((2, 3, 4, 5), blocks, strict=True):
            for block in range(count):
                name = f"res{stage}_{block}_branch"
                stride = 2 if block == 0 and stage > 2 else 1
                transformed = self.conv_affine(x, f"{name}2a", stride).relu()
                transformed = self.conv_affine(transformed, f"{name}2b", pad=1).relu()
                transformed = self.conv_affine(transformed, f"{name}2c")
                shortcut = self.conv_affine(x, f"{name}1", stride) if block == 0 else x
                x = (transformed + shortcut).relu()
            sums[f"res{stage}_{count - 1}_sum"] = x
        return sums

    def fpn(self, sums):
        levels, above = {}, None
        for level, (name, x) in zip((5, 4, 3, 2), reversed(sums.items()), strict=True):
            if above is None:
                inner = self.conv(x, f"fpn_inner_{name}")
            else:
                doubled = above.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                inner = self.conv(x, f"fpn_inner_{name}_lateral") + doubled
            levels[f"p{level}"] = self.conv(inner, f"fpn_{name}", pad=1)
            above = inner
        levels["p6"] = levels["p5"][:, :, ::2, ::2]
        return levels

    def rpn(self, x):
        x = self.conv(x, "conv_rpn_fpn2", pad=1).relu()
        return self.conv(x, "rpn_cls_logits_fpn2"), self.conv(x, "rpn_bbox_pred_fpn2")

    def roi_features(self, levels, size):
        rois = torch.cat([torch.zeros(len(BOXES), 1), BOXES], dim=1)
        return roi_align(levels["p2"], rois, size, 1 / 4, sampling_ratio=2, aligned=False)

    def boxes(self, levels):
        x = self.fc(self.fc(self.roi_features(levels, 7), "fc6").relu(), "fc7").relu()
        return self.fc(x, "cls_score").softmax(dim=1), self.fc(x, "bbox_pred")

    def mask_weights(self, inputs, layers, slope):
        """(K + 1, C): T, for the background as well."""
        cls, box = self.blobs["cls_score_w"], self.blobs["bbox_pred_w"]
        box = box.reshape(len(cls), -1)
        x = {"cls": cls, "box": box, "cls+box": torch.cat([cls, box], dim=1)}.get(inputs)
        x = self.blobs[inputs] if x is None else x
        for layer in range(1, layers):
            x = self.fc(x, f"bbox2mask_mlp_l{layer}")
            x = torch.where(x > 0, x, slope * x)
        return self.fc(x, "mask_fcn_logits_w_flat")

    def masks(self, levels, masks, layers, mlp, slope):
        """(R, 1 or K + 1, M, M) logits."""
        x = self.roi_features(levels, 4)
        for conv in (1, 2, 3, 4):
            x = self.conv(x, f"_[mask]_fcn{conv}", pad=1).relu()
        # The transposed convolution puts a 2x2 patch at every pixel.
        patches = torch.einsum("ricd,ioyx->rocydx", x, self.blobs["conv5_mask_w"])
        x = patches.reshape(*patches.shape[:2], 8, 8) + self.blobs["conv5_mask_b"][:, None, None]
        x = x.relu()
        if masks in ("agnostic", "specific"):
            logits = self.conv(x, "mask_fcn_logits")
        else:
            logits = F.conv2d(x, self.mask_weights(masks, layers, slope)[:, :, None, None])
        return logits + self.fc(x, "mask_mlp_logits_raw").reshape(-1, 1, 8, 8) if mlp else logits


def build(options):
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / "MaskX" / "Base-MaskX-RCNN-FPN.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *map(str, options)])
    torch.manual_seed(1)
    return build_model(cfg).eval()


def load(model, path, caplog):
    """Load as Detectron2 does; it warns of every weight that does not find its place."""
    weights = torch.load(path, weights_only=True)["model"]
    incompatible = model.load_state_dict(dict(weights), strict=False)
    assert incompatible.missing_keys == incompatible.unexpected_keys == []
    # What kind of mask head a checkpoint is of, only our own ones say.
    assert set(model.state_dict()) - set(weights) <= {"roi_heads.mask_head._extra_state"}
    caplog.clear()
    DetectionCheckpointer(model).load(str(path))
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")], caplog.text


def assert_equal(actual, expected, what):
    tolerance = 1e-4 * expected.abs().max().item()
    assert expected.std() > 10 * tolerance, f"{what} says nothing"
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=tolerance, msg=lambda m: what + m)


FULL_METHOD = {"masks": "cls+box", "layers": 2, "mlp": True}
MODELS = {
    "full method, R-50": {"depth": 50, "rows": 81, **FULL_METHOD},
    "full method, R-101": {"depth": 101, "rows": 81, **FULL_METHOD},
    "Visual Genome, R-50": {"depth": 50, "rows": 3002, **FULL_METHOD},
    "Visual Genome, R-101": {"depth": 101, "rows": 3002, **FULL_METHOD},
    "Visual Genome, detector": {"depth": 101, "rows": 3002, "masks": None},
    "1 layer of cls": {"masks": "cls", "layers": 1},
    "3 layers of box, ReLU": {"masks": "box", "layers": 3, "slope": 0.0},
    "random vectors": {"masks": "v_randn_0", "layers": 2},
    "baseline": {"masks": "agnostic", "mlp": True},
    "oracle": {"masks": "specific", "rows": 81},
    "Faster R-CNN": {"masks": None},
    "Fast R-CNN": {"masks": None, "rpn": False},
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_converted_model_computes_what_the_blobs_do_in_caffe2(tmp_path, caplog, name):
    facts = {"depth": 50, "rows": 5, "layers": 2, "mlp": False, "rpn": True, **MODELS[name]}
    slope = facts.pop("slope", 0.1)
    blobs = make_blobs(**facts)
    converted = convert_caffe2_blobs(blobs, f"USE_LEAKYRELU: {str(slope > 0).lower()}")
    save_detectron2_checkpoint(converted, tmp_path / "model.pth")
    options = runpy.run_path(str(TOOL))["config_options"](converted.architecture)
    model = build([*options, *NARROW])
    load(model, tmp_path / "model.pth", caplog)

    image = torch.randint(256, (3, 64, 96)).float()  # BGR
    data = (image - torch.from_numpy(PIXEL_MEANS)[:, None, None])[None]
    net, blocks = Caffe2Net(blobs), CAFFE2["BLOCKS"][facts["depth"]]
    levels = net.fpn(net.body(data, blocks))
    images = model.preprocess_image([{"image": image}])
    torch.testing.assert_close(images.tensor, data)
    features = model.backbone(images.tensor)
    for level in ("p2", "p3", "p4", "p5", "p6"):
        assert_equal(features[level], levels[level], level)
    if facts["rpn"]:
        objectness, deltas = model.proposal_generator.rpn_head([features["p3"]])
        for actual, expected in zip((objectness[0], deltas[0]), net.rpn(levels["p3"]), strict=True):
            assert_equal(actual, expected, "RPN")

    heads, in_features = model.roi_heads, ["p2", "p3", "p4", "p5"]
    pooled = heads.box_pooler([features[level] for level in in_features], [Boxes(BOXES)])
    scores, deltas = heads.box_predictor(heads.box_head(pooled))
    prob, expected_deltas = net.boxes(levels)
    assert_equal(scores.softmax(dim=1), prob.roll(-1, dims=1), "scores")  # background last
    assert_equal(deltas, expected_deltas[:, 4:], "deltas")  # no background
    if facts["masks"] is None:
        return

    arguments = {key: facts[key] for key in ("masks", "layers", "mlp")}
    logits = net.masks(levels, **arguments, slope=slope)
    expected = logits[:, 0] if len(logits[0]) == 1 else logits[range(len(BOXES)), CLASSES + 1]
    pooled = heads.mask_pooler([features[level] for level in in_features], [Boxes(BOXES)])
    detector = heads.detector_weights()
    assert_equal(MaskXHead.forward(heads.mask_head, pooled, CLASSES, detector), expected, "masks")
    # The way of inference, of which the masks are the end.
    instances = Instances((64, 96), pred_boxes=Boxes(BOXES), pred_classes=CLASSES)
    (instances,) = heads.forward_with_given_boxes(features, [instances])
    assert_equal(instances.pred_masks[:, 0], expected.sigmoid(), "mask probabilities")


@pytest.mark.parametrize(("depth", "rows"), [(50, 81), (101, 81), (50, 3002), (101, 3002)])
def test_a_file_of_the_real_widths_fits_the_base_configuration(depth, rows):
    # Without the MLP: its 157 M weights would only repeat what the narrow files show.
    blobs = make_blobs(depth=depth, rows=rows, widths=CAFFE2["FULL"], fill=0.5)
    converted = convert_caffe2_blobs(blobs)
    options = runpy.run_path(str(TOOL))["config_options"](converted.architecture)
    with torch.device("meta"):  # shapes alone
        model = build([*options, "MODEL.DEVICE", "meta"])
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    del expected["roi_heads.mask_head._extra_state"]
    assert {name: weight.shape for name, weight in converted.weights.items()} == expected


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Run the tool in this process; returns its error message, or what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as end:
            return end.code
        return capsys.readouterr().out

    return run


def test_the_tool_converts_a_file_and_prints_the_options_that_go_with_it(
    tmp_path, caplog, run_main
):
    blobs = make_blobs(depth=101, rows=31, mlp=True)
    extra = {"fc6_w_momentum": np.zeros(3, np.float32), "odd_w": np.zeros((2, 3), np.float32)}
    content = {"blobs": blobs | extra, "cfg": "{USE_LEAKYRELU: true}"}
    source = write_python2_pickle(tmp_path / "model_final.pkl", content)
    target = tmp_path / "maskx.pth"
    refused = run_main(source, target)
    assert refused.startswith(
        f"error: {source}: Blobs of the file are not known (1): 'odd_w (2, 3)'"
    )
    assert not target.exists()

    *lines, options = run_main(source, target, "--allow-unknown").splitlines()
    norms = sum(name.endswith("_bn_s") for name in blobs)
    assert lines == [
        "model: ResNet-101 FPN, 30 classes",
        "masks: transfer, MLP single_fc",
        "T: from cls+box, 2 layer(s), leaky_relu between them",
        f"converted: {len(blobs)} blobs to {len(blobs) + 2 * norms} weights",
        "left out, 1 x momentum of the optimiser: fc6_w_momentum",
        "left out, NOT KNOWN: odd_w (2, 3)",
        f"wrote: {target}",
    ]
    options = shlex.split(options.removeprefix("options: "))
    load(build([*options, *NARROW]), target, caplog)


def test_the_tool_ends_with_the_message_of_a_user_error(tmp_path, run_main):
    source = tmp_path / "model_final.pkl"
    said = run_main(source, tmp_path / "maskx.pth")
    assert said == f"error: {source}: there is no such weights file. Check the path."
