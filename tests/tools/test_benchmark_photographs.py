import numpy as np
import torch
from benchmarks.measure import peak_bytes
from benchmarks.photographs import write_photograph

from maskx.data.coco import load_coco
from maskx.data.images import read_image_sample
from maskx.systems.maskx_rcnn.samples import InstanceMapper, masks_of_boxes
from maskx.torchvision import SampleDetector, maskx_rcnn

CPU = torch.device("cpu")


def test_the_memory_of_a_photograph_does_not_follow_its_pixels_times_its_objects(tmp_path):
    (record,) = load_coco(write_photograph(tmp_path, megapixels=4, objects=24), tmp_path).records
    assert len(record["annotations"]) == 24
    assert sum(isinstance(a["segmentation"], dict) for a in record["annotations"]) == 8
    model = SampleDetector(maskx_rcnn(5, channels=8, num_convs=1, detector={"min_size": 64}))

    def train():
        sample = InstanceMapper(range(4), sizes=model.sizes)(record, np.random.RandomState(0))
        assert sample["instances"]["gt_has_mask"].all()
        sum(model.train()([sample]).values()).backward()

    sample = read_image_sample(record)
    boxes = torch.tensor([a["bbox"] for a in record["annotations"]])
    classes = torch.tensor([a["class_index"] for a in record["annotations"]])

    def predict():
        masks_of_boxes(model.eval(), sample, boxes, classes).encode()

    # 24 masks are 96 MB as bool, 384 MB as float32.
    assert peak_bytes(train, CPU) < 40e6
    assert peak_bytes(predict, CPU) < 60e6
