"""Class lists that named category splits refer to."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).split(", "))


COCO_THING_CLASSES = _names(
    """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
    laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator,
    book, clock, vase, scissors, teddy bear, hair drier, toothbrush
    """
)
"""The 80 thing classes of COCO, ordered by category id, which is the order of class indices."""

VOC_CLASSES_IN_COCO = _names(
    """
    person, bicycle, car, motorcycle, airplane, bus, train, boat, bird, cat, dog, horse, sheep,
    cow, bottle, chair, couch, potted plant, dining table, tv
    """
)
"""The 20 classes of PASCAL VOC by their COCO names."""

VOC_CLASSES = _names(
    """
    aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse,
    motorbike, person, pottedplant, sheep, sofa, train, tvmonitor
    """
)
"""The 20 classes of PASCAL VOC, ordered by their value in its masks, which is the index + 1."""

VOC_TO_COCO = {name: name for name in VOC_CLASSES} | {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""COCO names of the classes of PASCAL VOC, in the order of `VOC_CLASSES`."""
