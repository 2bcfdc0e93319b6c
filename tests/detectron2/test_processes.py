"""Four processes learn what one does from the same batch, whoever of them has supervision."""

import json
import multiprocessing
import os
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from maskx.detectron2 import Trainer, register_coco
from maskx.engine.batches import part_of_batch

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(), reason="processes are forked, on CPUs"
)

# No RoI and no anchor is drawn by chance, and a step takes little time.
ALL_BOXES = (
    "MODEL.BACKBONE.NAME",
    "MaskXTimmFPN",
    "MODEL.MASKX.BACKBONE.NAME",
    "test_resnet",
    "MODEL.MASKX.BACKBONE.PRETRAINED",
    False,
    "MODEL.FPN.IN_FEATURES",
    ["layer1", "layer2", "layer3", "layer4"],
    "MODEL.RPN.POST_NMS_TOPK_TRAIN",
    0,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
    10**5,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    10**5,
    "INPUT.MASK_FORMAT",
    "bitmask",
)
FROZEN = (*ALL_BOXES, "MODEL.MASKX.FREEZE_DETECTOR", True, "MODEL.MASKX.GT_BOXES_ONLY", True)
STAGES = "quick_schedules/stage{}_scenes_cpu.yaml"
SYSTEMS = {
    "Mask^X": ("make_cfg", "", ALL_BOXES),
    "Mask^X, incomplete boxes": (
        "make_cfg",
        "",
        (*ALL_BOXES, "MODEL.PROPOSAL_GENERATOR.NAME", "MaskXRPN"),
    ),
    "Mask^X, stage 2": ("make_cfg", "voc2nonvoc/sw/clsbox_2_layer_mlp_R_50_FPN_1x.yaml", FROZEN),
    "Mask^X, hourglass": (
        "make_cfg",
        "",
        (
            *FROZEN,
            "MODEL.MASKX.TRUNK",
            "hourglass",
            "MODEL.ROI_MASK_HEAD.NUM_CONV",
            2,
            "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION",
            7,
        ),
    ),
    "Mask^X, masks from boxes": ("make_cfg", "", (*FROZEN, "MODEL.MASKX.BOX_LOSS.WEIGHT", 1.0)),
    "Mask^X, EMA teacher": (
        "make_cfg",
        "",
        (
            *FROZEN,
            "MODEL.MASKX.EMA_TEACHER.WEIGHT",
            1.0,
            "MODEL.MASKX.EMA_TEACHER.MIN_QUALITY",
            0.4,
        ),
    ),
    "Mask^X, PointRend": (
        "make_cfg",
        "other_heads/pointrend_clsbox_2_layer_R_50_FPN.yaml",
        FROZEN,
    ),
    "classifier": ("make_classifier_cfg", "", ()),
    "class patterns": ("make_deeplab_cfg", "", ()),
    "TransferNet, attention": ("make_transfer_cfg", STAGES.format("1_attention"), ()),
    "TransferNet": ("make_transfer_cfg", STAGES.format("2_joint"), ()),
    "TransferNet, baseline": ("make_transfer_cfg", STAGES.format("2_baseline"), ()),
    "LarvSeg": ("make_joint_cfg", "", ("MODEL.MASKX.LARVSEG.SYNCHRONISE_BANK", True)),
    "LarvSeg, one image": ("make_joint_cfg", "", ("MODEL.MASKX.LARVSEG.MEMORY", "single_image")),
    "ConceptMask 1": (  # which wants two images or more in each process
        "make_concept_cfg",
        STAGES.format("1_embedding"),
        ("SOLVER.IMS_PER_BATCH", 8),
    ),
    "ConceptMask 2": ("make_concept_cfg", STAGES.format("2_refinement"), ()),
    "ConceptMask 3": ("make_concept_cfg", STAGES.format("3_segmentation"), ()),
}


@pytest.fixture
def one_object(sparse_scenes):
    """Scenes with one object each, half of them without a mask for it.

    Detectron2's own losses of boxes are means of each process, which are equal only where all
    images have as many RoIs.
    """
    json_file, root = sparse_scenes
    content = json.loads(json_file.read_text(encoding="utf-8"))
    objects = [a["image_id"] for a in content["annotations"]]
    for key, name in (("images", "id"), ("annotations", "image_id")):
        content[key] = [entry for entry in content[key] if objects.count(entry[name]) == 1]
    path = root / "one_object.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    register_coco("one_object", path, root)
    return "one_object"


@pytest.fixture(params=SYSTEMS)
def cfg(request, one_object, tiny_train, tiny_sparse):
    fixture, file, opts = SYSTEMS[request.param]
    opts = ("SOLVER.IMS_PER_BATCH", 4, *opts)
    cfg = request.getfixturevalue(fixture)(*opts, **({"file": file} if file else {}))
    if fixture == "make_cfg":
        cfg.DATASETS.TRAIN = (one_object,)
    return cfg


def learn(model, batches, rank, num_processes):
    """Make two steps of SGD; return losses, gradient of the first, averaged, and weights."""
    for module in model.modules():  # batch statistics and chance are of a process alone
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            module.eval()
    parallel = model
    if num_processes > 1:
        # As Detectron2 wraps it: without find_unused_parameters a missing gradient is a hang.
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=1e-3)
    found = {}
    with EventStorage():
        for step, batch in enumerate(batches):
            losses = parallel(batch[part_of_batch(len(batch), rank, num_processes)])
            optimizer.zero_grad()
            sum(losses.values()).backward()
            for name, loss in losses.items():
                mean = loss.detach() / num_processes
                if num_processes > 1:
                    dist.all_reduce(mean)
                found[f"{name} of step {step}"] = mean
            if step == 0:  # later ones have what rounding makes of a ReLU at 0
                found["gradient"] = torch.cat([p.grad.flatten() for p in learned])
            optimizer.step()
    found["weights"] = torch.cat([p.detach().flatten() for p in learned])
    return found


def be_a_process(cfg, rank, num_processes, folder):
    torch.set_num_threads(1)
    draw = torch.rand

    def drawn(*size, **kwargs):  # PointRend draws points: all RoIs get the same, wherever they are
        torch.manual_seed(0)
        return draw(1, *size[1:], **kwargs).expand(size).clone()

    torch.rand = drawn
    try:
        loader = iter(Trainer.build_train_loader(cfg))  # of one process: whole batches
        batches = [next(loader) for _ in range(2)]
        if num_processes > 1:
            store, timeout = f"file://{folder / f'store_{num_processes}'}", timedelta(seconds=60)
            dist.init_process_group("gloo", store, timeout, num_processes, rank)
        torch.manual_seed(0)
        found = learn(build_model(cfg).train(), batches, rank, num_processes)
        torch.save(found, folder / f"{num_processes}_{rank}.pt")
    except BaseException:
        (folder / "error.txt").write_text(traceback.format_exc())
    os._exit(0)  # threads of gloo may abort the interpreter while it ends


def learn_together(cfg, num_processes, folder):
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=be_a_process, args=(cfg, rank, num_processes, folder))
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        process.kill()
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()
    found = [torch.load(folder / f"{num_processes}_{rank}.pt") for rank in range(num_processes)]
    assert all(torch.equal(found[0]["weights"], other["weights"]) for other in found)
    return found[0]


def test_losses_and_weights_do_not_depend_on_the_number_of_processes(cfg, tmp_path):
    expected = learn_together(cfg, 1, tmp_path)
    assert expected["gradient"].abs().max() > 0.01
    found = learn_together(cfg, 4, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
