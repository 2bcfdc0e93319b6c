"""A miniature Visual Genome: files of the same format, with every case that the rules tell apart.

Tests read this file with ``runpy``.
"""

import random
import re

from maskx.data.vocabularies import COCO_THING_CLASSES

WIDTH, HEIGHT = 60, 40

# From the published code: 18 classes whose synset has another name, or another sense.
MANUAL = """cell phone=cellular_telephone.n.01 couch=sofa.n.01 dining table=dinner_table.n.01
donut=doughnut.n.02 fire hydrant=water_faucet.n.01 hair drier=hand_blower.n.01 handbag=bag.n.04
hot dog=hotdog.n.01 orange=orange.n.01 potted plant=plant.n.01 remote=remote_control.n.01
skis=ski.n.01 sports ball=ball.n.01 stop sign=sign.n.02 suitcase=bag.n.06 teddy bear=teddy.n.01
tv=television.n.01 wine glass=wineglass.n.01"""


def manual_synsets():
    return dict(re.findall(r"([a-z][a-z ]*)=(\S+)", MANUAL.replace("\n", " ")))


def make_vg(seed):
    """Make `image_data.json` and `objects.json` of 100 images, and the COCO ids of val2017.

    All synsets of COCO classes occur 8 times, but that of "hair drier" once; person.n.01 is more
    frequent than person.n.02, dog.n.03 than dog.n.01 (some objects name it twice), and orange.n.02
    than orange.n.01, which is mapped by hand. 60 other synsets occur 1 to 9 times, so many are
    equally frequent.
    """
    rng = random.Random(seed)
    manual = manual_synsets()
    copies = {manual.get(n, f"{n.replace(' ', '_')}.n.01"): 8 for n in COCO_THING_CLASSES}
    copies |= {"hand_blower.n.01": 1, "person.n.02": 3, "dog.n.03": 1, "orange.n.02": 9}
    copies |= {f"other_{i}.n.0{1 + i % 3}": rng.randint(1, 9) for i in range(60)}
    several = [["person.n.01", "man.n.01"], ["other_1.n.02", "dog.n.03", "dog.n.03"]]
    synsets = [[s] for s, n in copies.items() for _ in range(n)] + [[]] * 20 + several * 6
    rng.shuffle(synsets)

    images = [
        {
            "image_id": 2 * i + 1,
            "url": f"https://cs.stanford.edu/people/rak248/VG_100K{'_2' * (i % 2)}/{2 * i + 1}.jpg",
            "width": WIDTH,
            "height": HEIGHT,
            "coco_id": 1000 + i if i % 3 else None,
            "flickr_id": None,
        }
        for i in range(100)
    ]
    images[4]["coco_id"] = -1
    rng.shuffle(images)
    objects = [{"image_id": image["image_id"], "objects": []} for image in images[:95]]
    for number, names in enumerate(synsets):
        x, y = rng.randint(-5, WIDTH), rng.randint(-5, HEIGHT - 5)
        item = {"x": x, "y": y, "w": rng.randint(0, 20), "h": rng.randint(1, 20)}
        item |= {"object_id": 500 + number, "synsets": names, "names": [], "merged_object_ids": []}
        if number % 50 == 7:
            item["object_id"] = 500  # repeated
        if number % 50 == 9:
            item["x"] = None
        rng.choice(objects)["objects"].append(item)
    return images, objects, {1000 + i for i in range(30)} | {77}
