"""Class patterns on the embedded host: from tagged images to a segmentation network.

Luo and Yang, "Learning Saliency-Free Model with Generic Features for Weakly-Supervised Semantic
Segmentation" (AAAI 2020), in the steps of :func:`learn_from_tags`. What a training image shows is
known by its tags alone: its true masks, where a file has them, are read by the evaluation only.
"""

import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from maskx.core.backbone_choice import build_backbone
from maskx.core.digests import network_hash
from maskx.core.files import write_json
from maskx.core.image_classifier import ImageClassifier, multi_hot
from maskx.core.sample_models import SampleClassifier
from maskx.data.coco import CocoData, load_coco
from maskx.data.dense_crf import check_crf
from maskx.data.image_samples import ImageMapper
from maskx.data.label_maps import read_label_map, semantic_label_map
from maskx.engine.batches import training_batches
from maskx.engine.prediction import evaluate_label_maps, predict_image_labels
from maskx.engine.training import CHECKPOINT_NAME, TrainingSettings, load_weights, train
from maskx.evaluation.figures import (
    contact_sheet,
    draw_heat_map,
    draw_label_map,
    plain_tile,
    save_png,
)
from maskx.evaluation.image_labels import evaluate_image_labels
from maskx.systems.class_patterns.deeplab import DeepLab
from maskx.systems.class_patterns.model import SampleSegmenter, predict_label_maps
from maskx.systems.class_patterns.patterns import ClassPatterns
from maskx.systems.class_patterns.projections import claim_folder, read_projections
from maskx.systems.class_patterns.proxy_masks import ProxyMaskSettings, mask_path
from maskx.systems.class_patterns.steps import (
    ClassifierSource,
    LayerMasks,
    discover,
    make_masks,
    masks_to_json,
    predict_masks,
    project,
    projections_folder,
    settings_name,
)

__all__ = ["TagRun", "TagSettings", "learn_from_tags", "open_classifier", "open_tagged_images"]

_MODEL_NAME = "model.json"
_STEPS = ("classifier", "patterns", "proxy", "segmenter", "retraining", "retrained")
_IN_FEATURE = "layer4"
_PAPER = ProxyMaskSettings(threshold="zero", resolve="ignore", crf=False)
_FIGURE_ROWS, _TILE_SIDE = 6, 256

# Peak of Adam, and the factor for the backbone, for classifier and segmentation network. With
# ImageNet weights as in the paper, which says nothing of random ones. The segmentation
# network goes on from the classifier's backbone; a small factor keeps what that has learned.
_RATES = {
    "classifier": {"random": (2e-3, 1.0), "imagenet": (1e-4, 0.05)},
    "segmenter": {"random": (2e-3, 0.1), "imagenet": (1e-4, 0.05)},
}


@dataclass(frozen=True)
class TagSettings:
    """What a run is defined by.

    Attributes:
        backbone: ``small`` or the name of a torchvision ResNet.
        pretrained: start a ResNet from ImageNet weights; its norms are then fixed.
        image_size: side of the squares that images are warped to.
        iterations: steps of the classifier.
        segmenter_iterations: steps of the segmentation network, in each of its two trainings.
        batch_size: images per step.
        seed: of weights, data order and the choice of images.
        layer: whose proxy masks are trained on; those of all blocks of the last stage are made.
        masks: how proxy masks are made. With ``crf`` the predictions are refined too, as in the
            paper; the masks of images with several labels are not.
        max_images_per_class: see :func:`maskx.systems.class_patterns.steps.discover`.
        multi_scale: segment images at 241 / 328, 1 and 401 / 328 of ``image_size`` and average the
            scores, as in the paper; three times the work.
        workers: processes that read training images; 0 reads them in the process that trains.
    """

    backbone: str = "small"
    pretrained: bool = False
    image_size: int = 128
    iterations: int = 500
    segmenter_iterations: int = 300
    batch_size: int = 16
    seed: int = 0
    layer: str = "C41"
    masks: ProxyMaskSettings = field(
        default=ProxyMaskSettings(threshold="otsu", resolve="standardised", crf=False)
    )
    max_images_per_class: int = 800
    multi_scale: bool = False
    workers: int = 0

    @property
    def test_sizes(self) -> tuple[int, ...]:
        """Sides of the squares at which the segmentation network is tested."""
        if not self.multi_scale:
            return (self.image_size,)
        return tuple(round(self.image_size * size / 328) for size in (241, 328, 401))


def learn_from_tags(
    train_data: CocoData,
    val_data: CocoData,
    settings: TagSettings,
    *,
    image_root: Path,
    output: Path,
    resume: bool = False,
    device: torch.device,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Learn to segment from image labels and evaluate every step.

    The steps: train a classifier of the image labels; find the class patterns; make proxy masks;
    train a segmentation network on them; predict the training images, restricted to their labels;
    train the network once more, on these predictions. The segmentation networks start from the
    backbone of the classifier, both times.

    Every step leaves its result in a folder of its own. With ``resume`` what is finished there is
    not made again and the interrupted step goes on; without, folders of an earlier run are kept as
    ``previous_run``, in the place of an older one.

    Args:
        train_data: images with image labels. Their true masks, if there are any, are read by the
            evaluation of the proxy masks and for the picture, never in training.
        val_data: images with true masks, of the same classes.
        settings: what to do.
        image_root: folder of the training images.
        output: folder of the results.
        resume: go on with an interrupted run.
        device: where to compute.
        report: receives the lines for the reader.

    Returns:
        Measures in percent: ``mIoU`` with ``proxy`` by layer (on the training images, where an
        undecided pixel is missed), ``trained`` and ``retrained`` (on the validation images);
        ``proxy_decided_only`` and ``proxy_undecided`` by layer; ``proxy_paper``, mIoU by layer
        with threshold 0 and conflicts ignored; ``tag_mAP``; and ``step_seconds``. Keys of proxy
        masks are there only if training images have true masks.

    Raises:
        FileNotFoundError: an image is missing.
        ImportError: the CRF is asked for, but not installed.
        ValueError: data or settings cannot be used, or results of another run are in the way.
    """
    if settings.masks.crf:
        check_crf()
    if not resume:
        _set_aside(output)
    seconds: dict[str, float] = {}
    run = TagRun(train_data, val_data, settings, image_root, output, device, seconds, report)

    classifier = run.train_classifier()
    patterns, masks = run.make_proxy_masks(classifier)
    chosen = masks[settings.layer].json_file
    identity = {"patterns": patterns.network, "proxy masks": chosen.stem}
    trained = run.train_segmenter("segmenter", classifier, chosen, identity)
    predicted = run.predict_training_images(trained)
    identity |= {"predicted by": network_hash(trained.network), "at": list(trained.test_sizes)}
    retrained = run.train_segmenter("retrained", classifier, predicted, identity)

    mean_iou: dict[str, Any] = {}
    metrics: dict[str, Any] = {"mIoU": mean_iou}
    evaluations = {layer: of_layer.evaluation for layer, of_layer in masks.items()}
    if all(evaluations.values()):
        mean_iou["proxy"] = {
            layer: found["undecided_missed"]["mIoU"]["all"] for layer, found in evaluations.items()
        }
        metrics["proxy_decided_only"] = {
            layer: found["decided_only"]["mIoU"]["all"] for layer, found in evaluations.items()
        }
        metrics["proxy_undecided"] = {
            layer: found["undecided"] for layer, found in evaluations.items()
        }
        metrics["proxy_paper"] = run.evaluate_paper_masks(patterns, mean_iou["proxy"])
    mean_iou["trained"] = run.evaluate(trained, "trained")
    mean_iou["retrained"] = run.evaluate(retrained, "retrained")
    metrics["tag_mAP"] = run.evaluate_tags(classifier)
    with run.timed("picture"):
        draw_steps(run, patterns, masks[settings.layer], retrained)
    metrics["step_seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    report("\n" + format_steps(metrics))
    return metrics


@dataclass
class TagRun:
    """What the steps of :func:`learn_from_tags` share, and the steps themselves.

    Attributes:
        train_data: see :func:`learn_from_tags`, as for the others.
        val_data: images to evaluate on.
        settings: what to do.
        image_root: folder of the training images.
        output: folder of the results.
        device: where to compute.
        seconds: taken so far, by step.
        report: receives the lines for the reader.
    """

    train_data: CocoData
    val_data: CocoData
    settings: TagSettings
    image_root: Path
    output: Path
    device: torch.device
    seconds: dict[str, float]
    report: Callable[[str], None]

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the seconds of what runs inside to those of a step."""
        started = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.train_data.class_names)

    def identity(self) -> dict[str, Any]:
        """Say what all trainings of the run are defined by, as plain values."""
        shared = ("backbone", "pretrained", "image_size")
        chosen = {key: getattr(self.settings, key) for key in shared}
        data = {"annotation file": self.train_data.json_file.name}
        return data | {"number of images": len(self.train_data.records)} | chosen

    def train_classifier(self) -> SampleClassifier:
        """Train the classifier of the image labels, or read it if it is there."""
        settings = self.settings
        folder = self.output / "classifier"
        content = {
            "backbone": settings.backbone,
            "frozen_norm": settings.pretrained,
            "image_size": settings.image_size,
            "class_names": list(self.train_data.class_names),
        }
        torch.manual_seed(settings.seed)
        model = _build_classifier(content, pretrained=settings.pretrained)
        layers = tuple(model.classifier.backbone.layer_aliases)
        if settings.layer not in layers:
            raise ValueError(
                f"layer must be a block of the last stage of {settings.backbone}, one of "
                f"{', '.join(layers)}; got {settings.layer!r}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        mapper = ImageMapper(self.num_classes, size=settings.image_size, label_maps=False)
        with self.timed("classifier"):
            self._train(model, "classifier", settings.iterations, self.train_data, mapper, {})
        write_json(folder / _MODEL_NAME, content)
        return model

    def make_proxy_masks(
        self, model: SampleClassifier
    ) -> tuple[ClassPatterns, dict[str, LayerMasks]]:
        """Find the class patterns of all blocks of the last stage; make masks of each."""
        records, folder = self.train_data.records, self.output / "proxy"
        source = _source(model, str(self.output / "classifier"))
        layers = tuple(model.classifier.backbone.layer_aliases)
        shared = {"batch_size": self.settings.batch_size, "report": self.report}
        with self.timed("patterns"):
            patterns = discover(
                source,
                records,
                self.train_data.class_names,
                layers,
                output=self.output / "patterns",
                max_images_per_class=self.settings.max_images_per_class,
                seed=self.settings.seed,
                **shared,
            )
        with self.timed("projections"):
            project(source, records, patterns, layers, folder, **shared)
        self.report(f"\nProxy masks: {settings_name(self.settings.masks)}")
        return patterns, self._make_masks(patterns, self.settings.masks, "proxy masks")

    def evaluate_paper_masks(
        self, patterns: ClassPatterns, found: Mapping[str, float]
    ) -> dict[str, float]:
        """Mean IoU by layer of the masks with threshold 0 and undecided conflicts."""
        if self.settings.masks == _PAPER:
            return dict(found)
        self.report(f"\nFor comparison: {settings_name(_PAPER)}")
        masks = self._make_masks(patterns, _PAPER, "proxy masks for comparison")
        key = "undecided_missed"
        return {layer: made.evaluation[key]["mIoU"]["all"] for layer, made in masks.items()}

    def _make_masks(
        self, patterns: ClassPatterns, settings: ProxyMaskSettings, step: str
    ) -> dict[str, LayerMasks]:
        with self.timed(step):
            return make_masks(
                self.train_data.records,
                patterns,
                tuple(patterns.layers),
                self.output / "proxy",
                image_root=self.image_root,
                category_ids=self.train_data.category_ids,
                settings=settings,
                workers=max(1, self.settings.workers),
                report=self.report,
            )

    def train_segmenter(
        self, name: str, start: SampleClassifier, json_file: Path, identity: Mapping[str, Any]
    ) -> SampleSegmenter:
        """Train a segmentation network, from the classifier's backbone on.

        Args:
            name: of the step and its folder.
            start: the classifier.
            json_file: training images and their label maps.
            identity: what this training is defined by beside :meth:`identity`.
        """
        settings = self.settings
        # Records of the masks' own file: the true masks are not within reach.
        data = load_coco(json_file, self.image_root)
        torch.manual_seed(settings.seed)
        network = _build_segmenter(settings.backbone, settings.pretrained, self.num_classes)
        network.backbone.load_state_dict(start.classifier.backbone.state_dict())
        model = SampleSegmenter(network, test_sizes=settings.test_sizes, crf=settings.masks.crf)
        mapper = ImageMapper(self.num_classes, size=settings.image_size, label_maps=True)
        with self.timed(name):
            self._train(model, name, settings.segmenter_iterations, data, mapper, identity)
        return model

    def predict_training_images(self, model: SampleSegmenter) -> Path:
        """Predict label maps of nothing but the labels of each image, to train on."""
        data, folder = self.train_data, self.output / "retraining"
        masks = folder / "label_maps"
        made_with = {
            "network": network_hash(model.network),
            "sizes": list(model.test_sizes),
            "crf": self.settings.masks.crf,
        }
        claim_folder(masks, "predictions.json", made_with)
        with self.timed("predictions"):
            predict_masks(model, data.records, masks)
        json_file = folder / "annotations.json"
        names, ids = data.class_names, data.category_ids
        masks_to_json(json_file, data.records, masks, self.image_root, class_names=names, ids=ids)
        return json_file

    def evaluate(self, model: SampleSegmenter, name: str) -> float:
        """Mean IoU on the validation images, in percent."""
        records = self.val_data.records
        predictions = predict_label_maps(model, records, description=f"{name}: evaluation")
        with self.timed("evaluation"):
            results = evaluate_label_maps(predictions, records, self.num_classes)
        return results["mIoU"]["all"]

    def evaluate_tags(self, model: SampleClassifier) -> float:
        """Mean average precision of the image labels of the validation images, in percent."""
        records = self.val_data.records
        with self.timed("evaluation"):
            prob = predict_image_labels(model, records, description="tags: evaluation")
        labels = multi_hot([record["image_labels"] for record in records], self.num_classes)
        return evaluate_image_labels(prob, labels.numpy())["mAP"]

    def _train(
        self,
        model: nn.Module,
        name: str,
        iterations: int,
        data: CocoData,
        mapper: ImageMapper,
        identity: Mapping[str, Any],
    ) -> None:
        settings = self.settings
        kind = "classifier" if name == "classifier" else "segmenter"
        rate, factor = _RATES[kind]["imagenet" if settings.pretrained else "random"]
        prefix = {"classifier": "classifier.backbone.", "segmenter": "network.backbone."}[kind]
        training = TrainingSettings(
            iterations=iterations,
            batch_size=settings.batch_size,
            learning_rate=rate,
            weight_decay=0.0,
            seed=settings.seed,
            checkpoint_every=max(50, iterations // 20),
            optimizer="adam",
            lr_multipliers={prefix: factor},
        )
        batches = functools.partial(
            training_batches,
            data.records,
            mapper,
            batch_size=settings.batch_size,
            seed=settings.seed,
            num_workers=settings.workers,
        )
        # What is not to go on was set aside before: a checkpoint here is of this run.
        train(
            model,
            batches,
            training,
            output_dir=self.output / name,
            resume=True,
            identity=self.identity() | dict(identity),
            device=self.device,
            description=f"{name}: training",
        )
        model.eval()


# --- networks


def open_classifier(
    folder: str | Path, device: torch.device | str = "cpu"
) -> tuple[ClassifierSource, tuple[str, ...]]:
    """Open a classifier that :func:`learn_from_tags` trained.

    Args:
        folder: its folder, ``classifier`` in that of the run.
        device: where to compute.

    Returns:
        The classifier and the names of its classes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another kind.
    """
    folder = Path(folder)
    path = folder / _MODEL_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file '{path}', which says what network the classifier is. Give the "
            "folder 'classifier' of a finished run: tools/quickstart.py --system class_patterns."
        )
    try:
        content = json.loads(path.read_bytes())
        model = _build_classifier(content, pretrained=False)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' is damaged ({type(error).__name__}: {error}). Train the classifier again."
        ) from error
    load_weights(model, folder / CHECKPOINT_NAME)
    return _source(model.to(device), str(folder)), tuple(content["class_names"])


def open_tagged_images(
    folder: str | Path,
    json_file: str | Path,
    image_root: str | Path,
    *,
    device: torch.device | str = "cpu",
    strict: bool = True,
) -> tuple[ClassifierSource, list[dict[str, Any]], tuple[str, ...]]:
    """Open a classifier and images of its classes.

    Args:
        folder: see :func:`open_classifier`.
        json_file: COCO-format file; images need nothing but ``image_labels`` or annotations.
        image_root: folder of its images.
        device: where to compute.
        strict: see :func:`maskx.data.coco.load_coco`.

    Returns:
        The classifier, the records and the names of the classes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is bad, or of other classes than the classifier.
    """
    source, class_names = open_classifier(folder, device)
    data = load_coco(json_file, image_root, strict=strict)
    if data.class_names != class_names:
        unknown = sorted(set(data.class_names) - set(class_names))
        missing = sorted(set(class_names) - set(data.class_names))
        raise ValueError(
            f"'{json_file}' must have the {len(class_names)} classes of {source.name}, in their "
            f"order. Not among them: {unknown[:8] or 'none'}; missing: {missing[:8] or 'none'}. "
            "Give an annotation file with the class list that the classifier was trained with."
        )
    return source, data.records, class_names


def _source(model: SampleClassifier, name: str) -> ClassifierSource:
    return ClassifierSource(
        classifier=model.classifier,
        preprocess=model.preprocess,
        read_image=ImageMapper(model.num_classes, size=None, label_maps=False).read_image,
        name=f"the classifier in '{name}'",
        settings={"image_size": model.size},
    )


def _build_classifier(content: Mapping[str, Any], *, pretrained: bool) -> SampleClassifier:
    backbone = build_backbone(
        content["backbone"],
        frozen_norm=content["frozen_norm"],
        pretrained=pretrained,
    )
    classifier = ImageClassifier(
        backbone,
        in_feature=_IN_FEATURE,
        in_channels=backbone.feature_shapes[_IN_FEATURE].channels,
        num_classes=len(content["class_names"]),
    )
    return SampleClassifier(classifier, size=content["image_size"])


def _build_segmenter(name: str, frozen_norm: bool, num_classes: int) -> DeepLab:
    backbone = build_backbone(name, frozen_norm=frozen_norm, pretrained=False)
    # The features of a small image are 16 x 16, where dilation 12 would mostly see the border.
    head = {"hidden_channels": 128, "dilation": 4} if name == "small" else {}
    return DeepLab(
        backbone,
        in_feature=_IN_FEATURE,
        in_channels=backbone.feature_shapes[_IN_FEATURE].channels,
        num_classes=num_classes,
        **head,
    )


# --- results


def format_steps(metrics: Mapping[str, Any]) -> str:
    """Lay out the measures in a table."""
    mean_iou = metrics["mIoU"]
    lines = ["| step | mIoU in percent | measured on |", "|---|---|---|"]
    for layer, value in mean_iou.get("proxy", {}).items():
        paper = metrics["proxy_paper"][layer]
        lines.append(f"| proxy masks of {layer} | {value:.1f} | training images |")
        lines.append(
            f"| the same with threshold 0, conflicts ignored | {paper:.1f} | training images |"
        )
    for name in ("trained", "retrained"):
        lines.append(f"| network, {name} | {mean_iou[name]:.1f} | validation images |")
    lines.append(f"Image labels: mAP {metrics['tag_mAP']:.1f} percent on the validation images")
    times = ", ".join(f"{name} {value:.0f}" for name, value in metrics["step_seconds"].items())
    return "\n".join([*lines, f"Seconds: {times}"])


def draw_steps(
    run: TagRun, patterns: ClassPatterns, masks: LayerMasks, model: SampleSegmenter
) -> None:
    """Draw training images from the image to the prediction into ``predictions.png``."""
    layer, data = run.settings.layer, run.train_data
    records = _varied(data.records)
    predicted = dict(predict_label_maps(model, records, description="picture"))
    read_image = ImageMapper(run.num_classes, size=None, label_maps=False).read_image
    names = {"num_classes": run.num_classes, "names": data.class_names, "side": _TILE_SIDE}
    tiles, titles = [], []
    for number, record in enumerate(records):
        image_id = record["image_id"]
        image = np.ascontiguousarray(read_image(record)["image"].permute(1, 2, 0).numpy())
        labels, projections = read_projections(
            projections_folder(run.output / "proxy", layer), image_id
        )
        row = number % len(labels)
        scores = projections[row] / float(patterns.layers[layer].std[labels[row]])
        scores = scores - masks.summary.thresholds[labels[row]]
        masks_folder = masks.json_file.parent / "masks" / masks.json_file.stem
        proxy = read_label_map(
            *(mask_path(masks_folder, image_id), *image.shape[:2]),
            num_classes=run.num_classes,
            image_id=image_id,
        )
        truth = semantic_label_map(record, run.num_classes)
        tiles += [
            plain_tile(image, _TILE_SIDE),
            draw_heat_map(image, scores, symmetric=True, side=_TILE_SIDE),
            *(draw_label_map(image, m, **names) for m in (proxy, predicted[image_id], truth)),
        ]
        tags = ", ".join(data.class_names[label] for label in labels)
        titles.append(f"tags: {tags}; projection: {data.class_names[labels[row]]}")
    columns = ("image", f"projection ({layer})", "proxy mask", "prediction", "truth")
    legend = (
        ((220, 30, 30), "projection above the threshold"),
        ((30, 60, 220), "below"),
        ((150, 150, 150), "hatched: undecided or unknown"),
    )
    sheet = contact_sheet(
        tiles, columns=len(columns), row_titles=titles, column_titles=columns, legend=legend
    )
    save_png(run.output / "predictions.png", sheet)


def _varied(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Choose images with labels that are not shown yet, those with two or three labels first."""
    chosen, shown = [], set()
    order = sorted(records, key=lambda r: abs(2.5 - len(r["image_labels"])))
    while len(chosen) < min(_FIGURE_ROWS, len(order)):
        rest = [r for r in order if r not in chosen and r["image_labels"]]
        if not rest:
            break
        best = max(rest, key=lambda r: len(set(r["image_labels"][:3]) - shown))
        chosen.append(best)
        shown |= set(best["image_labels"])
    return chosen


def _set_aside(output: Path) -> None:
    """Keep what an earlier run left as ``previous_run``, so that nothing of it is used."""
    found = [output / step for step in _STEPS if (output / step).exists()]
    if found:
        previous = output / "previous_run"
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
        for folder in found:
            folder.replace(previous / folder.name)
