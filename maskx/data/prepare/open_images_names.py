"""Names of the classes of Open Images as concepts, shared with COCO and Visual Genome.

Open Images labels have ids, such as /m/020lf, and names that differ between releases and are not
unique: "Mouse" is the animal and, in the first release, the computer mouse. Classes that COCO has
too are therefore told by their id.
"""

import os
from collections import Counter
from collections.abc import Mapping

from maskx.core.word_table import spelled
from maskx.data.prepare.csv_files import csv_rows

__all__ = ["OPEN_IMAGES_NAMES", "read_open_images_names"]

OPEN_IMAGES_NAMES = {
    "/m/01g317": "person",
    "/m/0199g": "bicycle",
    "/m/0k4j": "car",
    "/m/04_sv": "motorcycle",
    "/m/0cmf2": "airplane",
    "/m/01bjv": "bus",
    "/m/07jdr": "train",
    "/m/07r04": "truck",
    "/m/019jd": "boat",
    "/m/015qff": "traffic light",
    "/m/01pns0": "fire hydrant",
    "/m/02pv19": "stop sign",
    "/m/015qbp": "parking meter",
    "/m/0cvnqh": "bench",
    "/m/015p6": "bird",
    "/m/01yrx": "cat",
    "/m/0bt9lr": "dog",
    "/m/03k3r": "horse",
    "/m/07bgp": "sheep",
    "/m/01xq0k1": "cow",
    "/m/0bwd_0j": "elephant",
    "/m/01dws": "bear",
    "/m/0898b": "zebra",
    "/m/03bk1": "giraffe",
    "/m/01940j": "backpack",
    "/m/0hnnb": "umbrella",
    "/m/080hkjn": "handbag",
    "/m/01rkbr": "tie",
    "/m/01s55n": "suitcase",
    "/m/02wmf": "frisbee",
    "/m/071p9": "skis",
    "/m/06__v": "snowboard",
    "/m/018xm": "sports ball",
    "/m/02zt3": "kite",
    "/m/03g8mr": "baseball bat",
    "/m/03grzl": "baseball glove",
    "/m/06_fw": "skateboard",
    "/m/019w40": "surfboard",
    "/m/0h8my_4": "tennis racket",
    "/m/04dr76w": "bottle",
    "/m/09tvcd": "wine glass",
    "/m/0dt3t": "fork",
    "/m/04ctx": "knife",
    "/m/0cmx8": "spoon",
    "/m/04kkgm": "bowl",
    "/m/09qck": "banana",
    "/m/014j1m": "apple",
    "/m/0l515": "sandwich",
    "/m/0cyhj_": "orange",
    "/m/0hkxq": "broccoli",
    "/m/0fj52s": "carrot",
    "/m/01b9xk": "hot dog",
    "/m/0663v": "pizza",
    "/m/0jy4k": "donut",
    "/m/0fszt": "cake",
    "/m/01mzpv": "chair",
    "/m/02crq1": "couch",
    "/m/03fp41": "potted plant",
    "/m/03ssj5": "bed",
    "/m/0h8n5zk": "dining table",
    "/m/09g1w": "toilet",
    "/m/07c52": "tv",
    "/m/01c648": "laptop",
    "/m/020lf": "mouse",
    "/m/0qjjc": "remote",
    "/m/01m2v": "keyboard",
    "/m/050k8": "cell phone",
    "/m/0fx9l": "microwave",
    "/m/029bxz": "oven",
    "/m/01k6s3": "toaster",
    "/m/0130jx": "sink",
    "/m/040b_t": "refrigerator",
    "/m/0bt_c3": "book",
    "/m/01x3z": "clock",
    "/m/02s195": "vase",
    "/m/01lsmm": "scissors",
    "/m/0kmg4": "teddy bear",
    "/m/03wvsk": "hair drier",
    "/m/012xff": "toothbrush",
    "/m/014sv8": "eye",
    "/m/015h_t": "beard",
    "/m/0283dt1": "mouth",
    "/m/031n1": "foot",
    "/m/035r7c": "leg",
    "/m/039xj_": "ear",
    "/m/03q69": "hair",
    "/m/04hgtk": "head",
    "/m/0dzct": "face",
    "/m/0dzf4": "arm",
    "/m/0k65p": "hand",
    "/m/0k0pj": "nose",
}
"""Concept names by id: 79 classes of COCO, and parts of the body that later releases call "Human".

COCO's "cup" has no class of its own: Open Images has boxes of "Coffee cup" and "Mug". A "sports
ball" is a "Ball" here, a "dining table" a "Kitchen & dining room table".
"""

_HEADER = ["LabelName", "DisplayName"]


def read_open_images_names(
    descriptions: str | os.PathLike[str], boxable: str | os.PathLike[str]
) -> dict[str, str]:
    """Read the names of classes: unique, in lower case, with spaces for underscores.

    Those of `OPEN_IMAGES_NAMES` have the name there. Of other classes with one name, the one that
    has boxes takes it; the rest, and all if none has boxes or several have, get their id behind it,
    such as "mouse (/m/04rmv)".

    Args:
        descriptions: `class-descriptions.csv`, `oidv6-class-descriptions.csv` or that of another
            release: ids and names of all classes.
        boxable: `class-descriptions-boxable.csv`, the same for the classes with boxes.

    Returns:
        Names by id.

    Raises:
        ValueError: A file is no list of classes, or gives an id twice.
    """
    with_boxes = _read_descriptions(boxable)
    given = with_boxes | _read_descriptions(descriptions)
    names = {label: name for label, name in OPEN_IMAGES_NAMES.items() if label in given}
    taken = set(OPEN_IMAGES_NAMES.values())
    for labels in (with_boxes, given):
        rest = {label: given[label] for label in labels if label not in names}
        names |= _unique(rest, taken)
        taken.update(rest.values())
    return names


def _unique(names: Mapping[str, str], taken: set[str]) -> dict[str, str]:
    """Put its id behind each name that is taken or shared."""
    uses = Counter(names.values())
    return {
        label: f"{name} ({label})" if name in taken or uses[name] > 1 else name
        for label, name in names.items()
    }


def _read_descriptions(path: str | os.PathLike[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for line, row in csv_rows(path):
        if line == 1 and row[:2] == _HEADER:  # releases up to V4 have none
            continue
        if len(row) < 2 or not row[0].startswith("/") or not spelled(row[1]) or row[0] in names:
            raise ValueError(
                f"{os.fspath(path)}, line {line} is {','.join(row)!r:.80}. Allowed: the id of a "
                "class, which no other line has, and its name, such as '/m/0199g,Bicycle'. Take "
                "the class descriptions of Open Images."
            )
        names[row[0]] = spelled(row[1]).lower()
    if not names:
        raise ValueError(f"{os.fspath(path)} has no class. Download it again.")
    return names
