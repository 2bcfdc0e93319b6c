import pytest
import torch
import torch.nn.functional as F

from maskx.systems.larvseg.evaluation import group_pixels


def test_perfect_groups_give_the_truth_at_stride_one():
    label_map = torch.tensor([[4, 4, 9, 9], [4, 255, 9, 2]])
    features = torch.eye(12)[label_map.where(label_map < 12, 11)].permute(2, 0, 1)
    generator = torch.Generator().manual_seed(0)
    found = group_pixels(5 * features, label_map, generator, ignore=255)
    known = label_map != 255
    assert torch.equal(found[known], label_map[known])
    # A pixel like no class has the same similarity to all: the lowest label.
    assert found[1, 1] == 2


def test_responses_are_cosines_to_one_pixel_of_each_class():
    torch.manual_seed(0)
    features = torch.randn(5, 3, 4)
    label_map = torch.randint(0, 3, (9, 13)) * 2
    found = group_pixels(features, label_map, torch.Generator().manual_seed(7), ignore=255)
    generator, maps = torch.Generator().manual_seed(7), []
    for label in (0, 2, 4):
        places = (label_map == label).nonzero().tolist()
        y, x = places[int(torch.randint(len(places), (), generator=generator))]
        seed = features[:, y * 3 // 9, x * 4 // 13]
        maps.append(F.cosine_similarity(features, seed[:, None, None], dim=0))
    maps = F.interpolate(torch.stack(maps)[None], (9, 13), mode="bilinear")[0]
    assert torch.equal(found, maps.argmax(dim=0) * 2)
    other = group_pixels(features, label_map, torch.Generator().manual_seed(8), ignore=255)
    assert not torch.equal(found, other)


@pytest.mark.parametrize("label", [255, 3])
def test_a_map_of_one_label_stays_so(label):
    label_map = torch.full((4, 6), label)
    found = group_pixels(torch.randn(5, 2, 3), label_map, torch.Generator(), ignore=255)
    assert torch.equal(found, label_map)
