"""Class patterns on pip alone: from tagged images to a segmentation network.

Luo and Yang, "Learning Saliency-Free Model with Generic Features for Weakly-Supervised Semantic
Segmentation" (AAAI 2020), in the steps of :func:`learn_from_tags`. What a training image shows is
known by its tags alone: its true masks, where a file has them, are read by the evaluation only.
"""

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from maskx.core.backbone_choice import build_backbone, choose_feature
from maskx.core.checks import check_choice
from maskx.core.digests import network_hash
from maskx.core.image_classifier import ImageClassifier, multi_hot
from maskx.core.pretrained import Pretrained
from maskx.core.sample_models import SampleClassifier
from maskx.core.text import listed
from maskx.data.coco import CocoData, load_coco
from maskx.data.dense_crf import check_crf
from maskx.data.images import ImageMapper
from maskx.engine.batches import training_batches
from maskx.engine.options import QuickstartOptions
from maskx.engine.prediction import evaluate_label_maps, predict_image_labels
from maskx.engine.runs import Run, link_run, origins_of_data, read_run
from maskx.engine.training import load_weights
from maskx.engine.training_chain import TrainingChain, start_of
from maskx.evaluation.figures import varied_records
from maskx.evaluation.image_labels import evaluate_image_labels
from maskx.systems.class_patterns.evaluation import draw_steps
from maskx.systems.class_patterns.model import DeepLab, SampleSegmenter, predict_label_maps
from maskx.systems.class_patterns.patterns import ClassPatterns
from maskx.systems.class_patterns.projections import claim_folder
from maskx.systems.class_patterns.proxy_masks import ProxyMaskSettings, write_proxy_json
from maskx.systems.class_patterns.steps import (
    ClassifierSource,
    LayerMasks,
    discover,
    make_masks,
    predict_masks,
    project,
    projections_folder,
)

NAME = "class_patterns"
_STEPS = ("classifier", "patterns", "proxy", "segmenter", "retraining", "retrained")
_PAPER = ProxyMaskSettings(threshold="zero", resolve="ignore", crf=False)

# Peak of Adam, and the factor for the backbone, for classifier and segmentation network. With
# ImageNet weights as in the paper, which says nothing of random ones. The segmentation
# network goes on from the classifier's backbone; a small factor keeps what that has learned.
_RATES = {
    "classifier": {"random": (2e-3, 1.0), "imagenet": (1e-4, 0.05)},
    "network": {"random": (2e-3, 0.1), "imagenet": (1e-4, 0.05)},
}


@dataclass(frozen=True)
class TagSettings:
    """What a run is defined by.

    Attributes:
        backbone: see :func:`maskx.core.backbone_choice.build_backbone`.
        pretrained: start from ImageNet weights; norms are then fixed.
        frozen: keep the backbone as it is; like ``feature_cache`` as
            :class:`maskx.engine.options.QuickstartOptions` has it.
        image_size: side of the squares that images are warped to.
        iterations: steps of the classifier.
        segmenter_iterations: steps of the segmentation network, in each of its two trainings.
        seed: of weights, data order and the choice of images.
        layer: whose proxy masks are trained on; those of all layers of the last stage are made.
            None for its first, which is the paper's best.
        masks: how proxy masks are made. With ``crf`` the predictions are refined too, as in the
            paper; the masks of images with several labels are not.
        max_images_per_class: see :func:`maskx.systems.class_patterns.steps.discover`.
        multi_scale: segment images at 241 / 328, 1 and 401 / 328 of ``image_size`` and average the
            scores, as in the paper; three times the work.
    """

    backbone: str = "small"
    pretrained: Pretrained = False
    frozen: bool = False
    feature_cache: float = QuickstartOptions.feature_cache
    image_size: int = 128
    iterations: int = 500
    segmenter_iterations: int = 300
    batch_size: int = 16
    seed: int = 0
    layer: str | None = None
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


def write_masks_json(json_file: Path, data: CocoData, masks: Path, image_root: Path) -> Path:
    """Write the images of a data set with the label maps of a folder, to train on; return the file.

    See :func:`maskx.systems.class_patterns.proxy_masks.write_proxy_json`.
    """
    write_proxy_json(
        json_file,
        data.records,
        masks,
        image_root=image_root,
        class_names=data.class_names,
        category_ids=data.category_ids,
    )
    return json_file


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

    Returns:
        Measures in percent: ``mIoU`` with ``proxy`` by layer (on the training images, where an
        undecided pixel is missed), ``trained`` and ``retrained`` (on the validation images);
        ``proxy_decided_only`` and ``proxy_undecided`` by layer; ``proxy_paper``, mIoU by layer
        with threshold 0 and conflicts ignored; ``IoU`` of the retrained network by class, NaN
        where there is no such pixel; ``tag_mAP``; ``uncertain_patterns`` by layer, names of the
        classes whose pattern has no sure sign; and ``step_seconds``. Keys of proxy masks are there
        only if training images have true masks.
    """
    if settings.masks.crf:
        check_crf()
    if not resume:
        _set_aside(output)
    folders = {"image_root": image_root, "output": output}
    run = TagRun(train_data, val_data, settings, **folders, device=device, report=report)
    classifier = run.train_classifier()
    patterns, masks = run.make_proxy_masks(classifier)
    chosen = masks[run.layer]
    identity = {"patterns": patterns.network, "proxy masks": chosen.json_file.stem}
    trained = run.train_segmenter("segmenter", classifier, chosen.json_file, identity)
    predicted = run.predict_training_images(trained)
    identity |= {"predicted by": network_hash(trained.network), "at": list(trained.test_sizes)}
    retrained = run.train_segmenter("retrained", classifier, predicted, identity)
    link_run(output, "retrained")

    mean_iou: dict[str, Any] = {}
    metrics: dict[str, Any] = {"mIoU": mean_iou}
    if all(of_layer.evaluation for of_layer in masks.values()):
        mean_iou["proxy"] = {layer: of_layer.mean_iou for layer, of_layer in masks.items()}
        found = {layer: of_layer.evaluation for layer, of_layer in masks.items()}
        metrics["proxy_decided_only"] = {
            layer: values["decided_only"]["mIoU"]["all"] for layer, values in found.items()
        }
        metrics["proxy_undecided"] = {layer: values["undecided"] for layer, values in found.items()}
        metrics["proxy_paper"] = run.evaluate_paper_masks(patterns, mean_iou["proxy"])
    mean_iou["trained"] = run.evaluate(trained, "trained")["mIoU"]["all"]
    results = run.evaluate(retrained, "retrained")
    mean_iou["retrained"] = results["mIoU"]["all"]
    per_class = zip(train_data.class_names, results["per_class"], strict=True)
    metrics["IoU"] = {"background": results["background"], **dict(per_class)}
    metrics["tag_mAP"] = run.evaluate_tags(classifier)
    metrics["uncertain_patterns"] = patterns.uncertain()
    with run.timed("picture"):
        records = varied_records(train_data.records, num_labels=2.5)
        draw_steps(
            output / "predictions.png",
            records,
            dict(predict_label_maps(retrained, records, description="picture")),
            class_names=train_data.class_names,
            layer=run.layer,
            projections=projections_folder(output / "proxy", run.layer),
            masks=chosen.folder,
            stds=patterns.layers[run.layer].std,
        )
    metrics["step_seconds"] = {name: round(value, 1) for name, value in run.seconds.items()}
    report("\n" + format_steps(metrics))
    return metrics


@functools.cache
def layers_of(backbone: str) -> tuple[str, ...]:
    """Name all layers of the last stage as the paper does; where they have no names, the last map.

    Args:
        backbone: see :func:`maskx.core.backbone_choice.build_backbone`.
    """
    with torch.device("meta"):
        network = build_backbone(backbone)
    aliases = list(network.layer_aliases)
    if not aliases:
        return (f"outputs.{choose_feature(network)[0]}",)
    stage = aliases[-1].rstrip("0123456789")
    return tuple(alias for alias in aliases if alias.startswith(stage))


class TagRun(TrainingChain):
    """The steps of :func:`learn_from_tags`, and what they share; what lies there is of this run."""

    def __init__(
        self,
        train_data: CocoData,
        val_data: CocoData,
        settings: TagSettings,
        *,
        image_root: Path,
        output: Path,
        device: torch.device | str,
        report: Callable[[str], None],
    ) -> None:
        run = Run(
            system=NAME,
            host="pip",
            class_names=train_data.class_names,
            settings={"pretrained": settings.pretrained},
            started_from=origins_of_data(train_data, output / "classifier"),
        )
        super().__init__(settings, output=output, resume=True, run=run, device=device)
        self.train_data, self.val_data = train_data, val_data
        self.image_root, self.report = image_root, report
        self.num_classes = len(train_data.class_names)

    @functools.cached_property
    def layers(self) -> tuple[str, ...]:
        """All layers of the last stage, see :func:`layers_of`."""
        return layers_of(self.settings.backbone)

    @property
    def layer(self) -> str:
        """The layer whose masks are trained on."""
        return self.settings.layer or self.layers[0]

    def train_classifier(self) -> SampleClassifier:
        """Train the classifier of the image labels, or read it if it is there."""
        settings = self.settings
        check_choice(f"layer of {settings.backbone}", self.layer, self.layers)
        model, content = self._build("classifier", pretrained=settings.pretrained)
        self._keep_features(model.classifier.backbone)
        self._learn(model, "classifier", content, self.train_data, settings.iterations)
        return model

    def make_proxy_masks(
        self, model: SampleClassifier
    ) -> tuple[ClassPatterns, dict[str, LayerMasks]]:
        """Find the class patterns of all layers of the last stage; make masks of each."""
        records, folder = self.train_data.records, self.output / "proxy"
        source = _source(model, str(self.output / "classifier"))
        shared = {"batch_size": self.settings.batch_size, "report": self.report}
        with self.timed("patterns"):
            patterns = discover(
                source,
                records,
                self.train_data.class_names,
                self.layers,
                output=self.output / "patterns",
                max_images_per_class=self.settings.max_images_per_class,
                seed=self.settings.seed,
                **shared,
            )
        with self.timed("projections"):
            project(source, records, patterns, self.layers, folder, **shared)
        self.report(f"\nProxy masks: {self.settings.masks.name}")
        return patterns, self._make_masks(patterns, self.settings.masks, "proxy masks")

    def evaluate_paper_masks(
        self, patterns: ClassPatterns, found: Mapping[str, float]
    ) -> dict[str, float]:
        """Mean IoU by layer of the masks with threshold 0 and undecided conflicts."""
        if self.settings.masks == _PAPER:
            return dict(found)
        self.report(f"\nFor comparison: {_PAPER.name}")
        masks = self._make_masks(patterns, _PAPER, "proxy masks for comparison")
        return {layer: made.mean_iou for layer, made in masks.items()}

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
            identity: what this training is defined by beside what all trainings are.
        """
        settings = self.settings
        # Records of the masks' own file: the true masks are not within reach.
        data = load_coco(json_file, self.image_root)
        form = {"test_sizes": settings.test_sizes, "crf": settings.masks.crf}
        model, content = self._build("network", form)
        model.network.backbone.load_state_dict(start.classifier.backbone.state_dict())
        # With the same weights a frozen one has the same features, whichever run they are of.
        model.network.backbone.cache = start.classifier.backbone.cache
        self._learn(model, name, content, data, settings.segmenter_iterations, identity)
        return model

    def predict_training_images(self, model: SampleSegmenter) -> Path:
        """Predict label maps of nothing but the labels of each image, to train on."""
        data, folder = self.train_data, self.output / "retraining"
        masks = folder / "label_maps"
        made_with = {"network": network_hash(model.network), "sizes": list(model.test_sizes)}
        claim_folder(masks, "predictions.json", made_with | {"crf": model.crf})
        with self.timed("predictions"):
            predict_masks(model, data.records, masks)
        return write_masks_json(folder / "annotations.json", data, masks, self.image_root)

    def evaluate(self, model: SampleSegmenter, name: str) -> dict[str, Any]:
        """Compare label maps of the validation images to the truth, in percent."""
        records = self.val_data.records
        predictions = predict_label_maps(model, records, description=f"{name}: evaluation")
        with self.timed("evaluation"):
            return evaluate_label_maps(predictions, records, self.num_classes)

    def evaluate_tags(self, model: SampleClassifier) -> float:
        """Mean average precision of the image labels of the validation images, in percent."""
        records = self.val_data.records
        with self.timed("evaluation"):
            prob = predict_image_labels(model, records, description="tags: evaluation")
        labels = multi_hot([record["image_labels"] for record in records], self.num_classes)
        return evaluate_image_labels(prob, labels.numpy())["mAP"]

    def _build(
        self, part: str, form: Mapping[str, Any] = MappingProxyType({}), **options: bool
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Build a model, and say what :func:`build_model` needs to build it again."""
        settings = self.settings
        content = {"part": part, "backbone": settings.backbone, **form}
        content |= {"frozen_norm": bool(settings.pretrained), "frozen": settings.frozen}
        content["image_size"] = settings.image_size
        torch.manual_seed(settings.seed)
        return build_model(content, self.train_data.class_names, **options), content

    def _learn(
        self,
        model: nn.Module,
        name: str,
        content: Mapping[str, Any],
        data: CocoData,
        iterations: int,
        identity: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        settings, part = self.settings, content["part"]
        rate, factor = _RATES[part][start_of(settings.pretrained, settings.frozen)]
        has_label_maps = part == "network"
        mapper = ImageMapper(self.num_classes, size=settings.image_size, label_maps=has_label_maps)
        self._train(
            model,
            name,
            functools.partial(training_batches, data.records, mapper),
            identity,
            model_settings=content,
            iterations=iterations,
            rate=rate,
            lr_multipliers={f"{part}.backbone.": factor},
        )


# --- models


def build_model(
    content: Mapping[str, Any], class_names: Sequence[str], *, pretrained: bool = False
) -> SampleClassifier | SampleSegmenter:
    """Build a model from the settings in the ``run.json`` of a step.

    Args:
        content: ``part``, "classifier" or "network"; ``backbone``, ``frozen_norm``,
            ``frozen``, ``image_size``; of a network ``test_sizes`` and ``crf`` as well.
        class_names: by class index; checkpoints hold them.
        pretrained: start from ImageNet weights.
    """
    try:
        backbone = build_backbone(
            content["backbone"],
            frozen_norm=content["frozen_norm"],
            frozen_stages="all" if content.get("frozen") else 0,
            pretrained=pretrained,
        )
        in_feature, shape = choose_feature(backbone)
        form = {"in_feature": in_feature, "in_channels": shape.channels}
        form["num_classes"] = len(class_names)
        about = {"pixel_mean": backbone.pixel_mean, "pixel_std": backbone.pixel_std}
        about["class_names"] = class_names
        if content["part"] == "classifier":
            classifier = ImageClassifier(backbone, **form)
            return SampleClassifier(classifier, size=content["image_size"], **about)
        # The features of a small image are 16 x 16, where dilation 12 would mostly see the border.
        if content["backbone"] == "small":
            form |= {"hidden_channels": 128, "dilation": 4}
        network = DeepLab(backbone, **form)
        sizes = tuple(content["test_sizes"])
        return SampleSegmenter(network, test_sizes=sizes, crf=content["crf"], **about)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"The settings {dict(content)} are none of a step of class patterns "
            f"({type(error).__name__}: {error}). Restore run.json, or train again."
        ) from error


def open_model(
    run: Run, device: torch.device | str, part: str = "network"
) -> SampleClassifier | SampleSegmenter:
    """Load what a step trained; ``part`` is what it is to be, see :func:`build_model`."""
    found = run.settings.get("part")
    if (run.system, found) != (NAME, part):
        what = "folder 'classifier' in that" if part == "classifier" else "folder"
        raise ValueError(
            f"'{run.folder}' holds a run of {run.system}, part {found!r}, not {part!r} of {NAME}. "
            f"Give the {what} of a finished run: tools/quickstart.py --system {NAME}."
        )
    model = build_model(run.settings, run.class_names).to(device)
    load_weights(model, run.weights_file)
    return model


def open_tagged_images(
    folder: str | Path,
    json_file: str | Path,
    image_root: str | Path,
    *,
    device: torch.device | str = "cpu",
    strict: bool = True,
) -> tuple[ClassifierSource, list[dict[str, Any]], tuple[str, ...]]:
    """Open a classifier that :func:`learn_from_tags` trained, and images of its classes.

    Args:
        folder: its folder, ``classifier`` in that of the run.
        json_file: COCO-format file; images need nothing but ``image_labels`` or annotations.
        image_root: folder of its images.
        strict: see :func:`maskx.data.coco.load_coco`.

    Returns:
        The classifier, the records and the names of the classes.
    """
    run = read_run(folder)
    source = _source(open_model(run, device, "classifier"), str(folder))
    data = load_coco(json_file, image_root, strict=strict)
    if data.class_names != run.class_names:
        unknown = sorted(set(data.class_names) - set(run.class_names))
        missing = sorted(set(run.class_names) - set(data.class_names))
        raise ValueError(
            f"'{json_file}' must have the {len(run.class_names)} classes of {source.name}, in "
            f"their order. Not among them: {unknown[:8] or 'none'}; missing: "
            f"{missing[:8] or 'none'}. Give an annotation file with the class list that the "
            "classifier was trained with."
        )
    return source, data.records, run.class_names


def _source(model: SampleClassifier, name: str) -> ClassifierSource:
    return ClassifierSource(
        model=model,
        read_image=ImageMapper(model.num_classes, size=None, label_maps=False).read_image,
        name=f"the classifier in '{name}'",
        settings={"image_size": model.size},
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
    for layer, names in metrics["uncertain_patterns"].items():
        if names:
            lines.append(
                f"{layer}: the sign of {len(names)} patterns is uncertain: {listed(names)}"
            )
    lines.append(f"Image labels: mAP {metrics['tag_mAP']:.1f} percent on the validation images")
    times = ", ".join(f"{name} {value:.0f}" for name, value in metrics["step_seconds"].items())
    return "\n".join([*lines, f"Seconds: {times}"])


def _set_aside(output: Path) -> None:
    """Keep what an earlier run left as ``previous_run``, so that nothing of it is used."""
    found = [output / step for step in _STEPS if (output / step).exists()]
    if found:
        previous = output / "previous_run"
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
        for folder in found:
            folder.replace(previous / folder.name)
