"""LarvSeg on pip alone: the trainings, from data to measures and a picture."""

import functools
import inspect
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from maskx.core.backbone_choice import build_backbone, choose_feature
from maskx.core.backbones import Backbone
from maskx.core.checks import check_choice
from maskx.core.digests import network_hash
from maskx.core.image_classifier import ImageClassifier
from maskx.core.losses import label_pairs
from maskx.core.pretrained import Pretrained
from maskx.core.sample_models import Sample
from maskx.data.coco import CocoData
from maskx.data.images import read_image_sample
from maskx.data.label_maps import has_pixels
from maskx.engine.options import QuickstartOptions
from maskx.engine.runs import Origin, Run, link_run, origins_of_data
from maskx.engine.training import CHECKPOINT_NAME, load_weights, read_checkpoint
from maskx.engine.training_chain import TrainingChain, start_of
from maskx.evaluation.figures import (
    contact_sheet,
    draw_heat_map,
    draw_label_map,
    plain_tile,
    save_png,
)
from maskx.supervision import CategorySplit, Supervision
from maskx.systems.larvseg.attention import attention_maps
from maskx.systems.larvseg.evaluation import evaluate_larvseg, predict_larvseg
from maskx.systems.larvseg.model import JointClassifier, LarvSegModel, read_extra_state
from maskx.systems.larvseg.network import POOLINGS, LarvSeg
from maskx.systems.larvseg.samples import (
    JointMapper,
    JointSets,
    LabelledImages,
    Record,
    joint_batches,
    labelled_images,
    sets_of_one_file,
    true_label_map,
)

logger = logging.getLogger(__name__)

METHODS = ("baseline", "larvseg")
BANKS = {"cross": "cross_image", "single": "single_image", "scores": "score_map"}

# What a checkpoint belongs to, beside what the training loop keeps itself.
_IDENTITY = ("backbone", "pretrained", "image_size", "logit_form", "bank_size", "top_tokens")
_IDENTITY += ("image_weight", "attentive_weight", "min_crop", "frozen")

# Peaks of Adam: the classifier from random weights and from ImageNet's, the segmentation.
_CLASSIFIER_RATES = {"random": 2e-3, "imagenet": 1e-4}
_RATE = 1e-3

_FIGURE_ROWS, _TILE_SIDE = 6, 256
# Settings of the network have their defaults where they are used.
_DEFAULTS = {name: value.default for name, value in inspect.signature(LarvSeg).parameters.items()}


@dataclass(frozen=True)
class LarvSegSettings:
    """What a chain of trainings is defined by, whatever the method.

    Attributes:
        backbone: see :func:`maskx.core.backbone_choice.build_backbone`.
        pretrained: start from ImageNet weights.
        frozen: keep the backbone as it is; like ``feature_cache`` as
            :class:`maskx.engine.options.QuickstartOptions` has it.
        image_size: of the squares that images are warped to in evaluation; in training each data
            set has its own.
        start_iterations: steps of the image classifier whose backbone both methods start from; 0
            starts from the backbone's initial weights, as one that is frozen does in any case.
        iterations: steps of each method.
        batch_size: images per step.
        seed: of weights and data order.
        logit_form: see :class:`maskx.systems.larvseg.network.CosineClassifier`.
        bank_size: images per class of the memory bank.
        top_tokens: tokens of an image that represent its class.
        image_weight: of the loss of image labels.
        attentive_weight: of the loss of image labels with attention.
        min_crop: see :class:`maskx.systems.larvseg.samples.JointMapper`.
        workers: processes that read training images; 0 reads them in the process that trains.
    """

    backbone: str = "small"
    pretrained: Pretrained = False
    frozen: bool = False
    feature_cache: float = QuickstartOptions.feature_cache
    image_size: int = 128
    start_iterations: int = 400
    iterations: int = 350
    batch_size: int = 16
    seed: int = 0
    logit_form: str = _DEFAULTS["logit_form"]
    bank_size: int = _DEFAULTS["bank_size"]
    top_tokens: int = _DEFAULTS["top_tokens"]
    image_weight: float = _DEFAULTS["image_weight"]
    attentive_weight: float = _DEFAULTS["attentive_weight"]
    min_crop: float = 1.0
    workers: int = 0


@dataclass(frozen=True)
class LarvSegMethod:
    """What image labels are learned with.

    Attributes:
        method: ``baseline``, pixels and image labels alone, or ``larvseg``, with attention too.
        bank: of LarvSeg, what attention maps are made with: ``cross``, the images seen last,
            ``single``, the image itself, or ``scores``, its scores; see ``memory`` of
            :class:`maskx.systems.larvseg.network.LarvSeg`.
        pooling: of LarvSeg, ``weighted`` as in the paper, or ``normalised``, see
            :func:`maskx.systems.larvseg.network.attentive_loss`.
    """

    method: str = "larvseg"
    bank: str = "cross"
    pooling: str = _DEFAULTS["pooling"]

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("bank", self.bank, tuple(BANKS))
        check_choice("pooling", self.pooling, POOLINGS)
        if self.method == "baseline" and self.name != "baseline":
            raise ValueError(
                "Method 'baseline' has no attention, so bank and pooling have no meaning for it. "
                "Leave them out."
            )

    @property
    def name(self) -> str:
        """The method and what differs from the defaults, fit for a folder."""
        words = [self.method]
        if self.bank != "cross":
            words.append(BANKS[self.bank])
        if self.pooling != _DEFAULTS["pooling"]:
            words.append(self.pooling)
        return "_".join(words)


class LarvSegChain(TrainingChain):
    """The trainings of one seed; all methods start from the same backbone.

    The steps: train a classifier of the image labels, whose backbone stands for the paper's
    ImageNet weights; train each :class:`LarvSegMethod` from it, in as many steps. Each leaves its
    checkpoint in a folder of its own and is made once.

    Args:
        sets: what is trained on.
        settings: what to do.
        output: folder of the checkpoints.
        resume: go on from the checkpoints that are there.
        split: base classes have masks.
        started_from: see :class:`maskx.engine.runs.Run`.
        device: where to compute.
    """

    def __init__(
        self,
        sets: JointSets,
        settings: LarvSegSettings,
        *,
        output: Path,
        resume: bool = False,
        split: CategorySplit | None = None,
        started_from: Mapping[str, Origin] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sets = sets
        keys = ("name", "supervision", "ratio", "image_size", "single_label", "attention")
        made_with = {
            "data sets": [
                {"images": len(each.records), **{key: getattr(each, key) for key in keys}}
                for each in sets.data_sets
            ],
            "scored": {name: list(indices) for name, indices in sets.scored.items()},
            **{name.replace("_", " "): getattr(settings, name) for name in _IDENTITY},
        }
        run = Run(
            system="larvseg",
            host="pip",
            class_names=sets.class_names,
            split=split,
            settings=made_with,
            started_from=started_from or {},
        )
        super().__init__(settings, output=output, resume=resume, run=run, device=device)

    @functools.cached_property
    def backbone(self) -> nn.Module:
        """The backbone that all methods start from."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        backbone = build_backbone(
            settings.backbone,
            frozen_norm=bool(settings.pretrained),
            frozen_stages="all" if settings.frozen else 0,
            pretrained=settings.pretrained,
        )
        self._keep_features(backbone)
        if settings.frozen or settings.start_iterations == 0:
            return backbone
        tagged = tuple(
            each for each in self.sets.data_sets if each.supervision == Supervision.IMAGE.value
        )
        if not tagged:
            raise ValueError(
                "No data set has supervision 'image', so there are no image labels to train the "
                "backbone with. Give one, or set start_iterations to 0."
            )
        in_feature, shape = choose_feature(backbone)
        classifier = ImageClassifier(
            backbone,
            in_feature=in_feature,
            in_channels=shape.channels,
            num_classes=self.sets.num_classes,
        )
        model = JointClassifier(
            classifier,
            image_size=settings.image_size,
            scored=self.sets.scored,
            pixel_mean=backbone.pixel_mean,
            pixel_std=backbone.pixel_std,
        )
        sets = replace(self.sets, data_sets=tagged)
        rate = _CLASSIFIER_RATES[start_of(settings.pretrained, settings.frozen)]
        batches = self._batches(sets)
        self._train(model, "start", batches, {}, iterations=settings.start_iterations, rate=rate)
        return backbone.to("cpu")

    def new_model(self, method: LarvSegMethod) -> LarvSegModel:
        """Make the model of a method before its training, with the shared backbone."""
        backbone = self.backbone
        torch.manual_seed(self.settings.seed)
        model = build_larvseg(
            self._architecture(method), self.sets.class_names, scored=self.sets.scored
        )
        model.network.backbone.load_state_dict(backbone.state_dict())
        # With the same weights it has the same features, whichever chain the backbone is of.
        model.network.backbone.cache = backbone.cache
        model.network.classifier.set_trained(self.sets.trained)
        return model

    def train_method(self, method: LarvSegMethod) -> LarvSegModel:
        """Train a method from the shared backbone."""
        model = self.new_model(method)
        self._train(
            model,
            method.name,
            self._batches(self.sets),
            {},
            model_settings={"model": self._architecture(method)},
            started_from={"start": network_hash(self.backbone)},
            iterations=self.settings.iterations,
            rate=_RATE,
        )
        return model

    def _keep_features(self, *backbones: Backbone) -> None:
        if self.settings.frozen and self.settings.min_crop < 1:
            logger.warning(
                "min_crop is %g: a crop drawn at random has features of its own, so none are kept "
                "and each step computes them. Set min_crop to 1 to keep them.",
                self.settings.min_crop,
            )
        else:
            super()._keep_features(*backbones)

    def _batches(self, sets: JointSets) -> functools.partial:
        mapper = JointMapper(sets, min_crop=self.settings.min_crop)
        return functools.partial(joint_batches, sets, mapper)

    def _architecture(self, method: LarvSegMethod) -> dict[str, Any]:
        """What :func:`build_larvseg` makes the network again from."""
        settings = self.settings
        is_baseline = method.method == "baseline"
        return {
            "backbone": settings.backbone,
            "frozen_norm": bool(settings.pretrained),
            "frozen": settings.frozen,
            "image_size": settings.image_size,
            "network": {
                "logit_form": settings.logit_form,
                "memory": "none" if is_baseline else BANKS[method.bank],
                "bank_size": settings.bank_size,
                "top_tokens": settings.top_tokens,
                "pooling": method.pooling,
                "image_weight": settings.image_weight,
                "attentive_weight": settings.attentive_weight,
            },
        }


def build_larvseg(
    architecture: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    scored: Mapping[str, Sequence[int]] | None = None,
) -> LarvSegModel:
    """Build a model with initial weights.

    Args:
        architecture: ``backbone``, ``frozen_norm``, ``frozen``, ``image_size`` and
            ``network``, arguments of :class:`maskx.systems.larvseg.network.LarvSeg`; kept in the
            checkpoints of the model.
        class_names: of the class table.
        scored: see :class:`maskx.systems.larvseg.model.LarvSegModel`.
    """
    backbone = build_backbone(
        architecture["backbone"],
        frozen_norm=architecture["frozen_norm"],
        frozen_stages="all" if architecture.get("frozen") else 0,
        pretrained=False,
    )
    in_feature, shape = choose_feature(backbone)
    return LarvSegModel(
        LarvSeg(
            backbone,
            in_feature=in_feature,
            in_channels=shape.channels,
            num_classes=len(class_names),
            **architecture["network"],
        ),
        class_names=class_names,
        scored=scored,
        image_size=architecture["image_size"],
        architecture=architecture,
        pixel_mean=backbone.pixel_mean,
        pixel_std=backbone.pixel_std,
    )


def open_larvseg(folder: str | Path, device: torch.device | str = "cpu") -> LarvSegModel:
    """Open a model that :class:`LarvSegChain` trained, from the checkpoint of its folder alone.

    Args:
        folder: of the run, or a file of its weights.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged or of another kind.
    """
    path = Path(folder)
    path = path if path.is_file() else path / CHECKPOINT_NAME
    weights = read_checkpoint(path, "cpu")["model"]
    try:
        content = read_extra_state(weights)
        model = build_larvseg(content["architecture"], content["class_names"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"'{path}' is no checkpoint of LarvSeg on pip alone ({type(error).__name__}: {error}). "
            "Give the folder 'larvseg' or 'baseline' of a finished run: tools/quickstart.py "
            "--system larvseg."
        ) from error
    load_weights(model, path)
    return model.to(device)


def learn_larvseg(
    train_data: CocoData,
    val_data: CocoData,
    split: CategorySplit,
    settings: LarvSegSettings,
    *,
    methods: Sequence[LarvSegMethod] = (LarvSegMethod("baseline"), LarvSegMethod("larvseg")),
    output: Path,
    resume: bool = False,
    device: torch.device,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Learn the baseline and LarvSeg from one start and evaluate both.

    Args:
        train_data: images with masks, of which those of novel classes are not read, and images
            with image labels; see :func:`maskx.systems.larvseg.samples.sets_of_one_file`.
        val_data: images with true masks, of the same classes.
        split: A the base classes, B the novel ones.
        settings: what to do.
        methods: what to compare.
        output: folder of the results.
        resume: go on with an interrupted run.
        device: where to compute.
        report: receives the lines for the reader.

    Returns:
        Measures in percent: ``mIoU`` of each method, of ``base``, ``novel`` and ``all`` classes;
        ``IoU`` by method and class; ``num_images`` by data set; ``step_seconds``.
    """
    if not split.without_masks:
        raise ValueError(
            f"Category split '{split.name}' leaves no novel class: all {len(split.class_names)} "
            "have masks. Name a split in which some have image labels only."
        )
    test, novel = labelled_images(val_data), split.without_masks
    if not any(record["image_labels"] and has_pixels(record) for record in test.records):
        raise ValueError(
            f"None of the {len(val_data.records)} validation images of '{val_data.json_file}' has "
            "a mask, so there is nothing to evaluate. Give a file with masks of all categories."
        )
    sets = sets_of_one_file(train_data, split, image_size=settings.image_size)
    num_images = {each.name: len(each.records) for each in sets.data_sets}
    report(
        f"{num_images['masks']} training images with masks of {len(sets.scored['masks'])} base "
        f"classes, {num_images['image labels']} with image labels of "
        f"{len(sets.scored['image labels'])} classes, {len(novel)} of them novel"
    )
    link_run(output, methods[-1].name)
    chain = LarvSegChain(
        sets,
        settings,
        output=output,
        resume=resume,
        split=split,
        started_from=origins_of_data(train_data, output / "run"),
        device=device,
    )
    metrics: dict[str, Any] = {"mIoU": {}, "IoU": {}}
    models = {}
    for method in methods:
        models[method.name] = model = chain.train_method(method)
        with chain.timed("evaluation"):
            found = evaluate_larvseg(model, test, novel, description=f"{method.name}: evaluation")
        metrics["mIoU"][method.name] = {
            group: found["mIoU"][group] for group in ("base", "novel", "all")
        }
        metrics["IoU"][method.name] = dict(zip(test.class_names, found["per_class"], strict=True))
    with chain.timed("picture"):
        draw_larvseg(output / "predictions.png", models, test, novel)
    metrics["num_images"] = num_images
    metrics["step_seconds"] = {name: round(value, 1) for name, value in chain.seconds.items()}
    report("\n" + format_larvseg(metrics))
    return metrics


def format_larvseg(metrics: Mapping[str, Any]) -> str:
    """Lay out the measures in a table."""
    lines = ["| mIoU in percent | novel | base | all |", "|---|---|---|---|"]
    for name, found in metrics["mIoU"].items():
        cells = [f"{found[group]:.1f}" for group in ("novel", "base", "all")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    times = ", ".join(f"{name} {value:.0f}" for name, value in metrics["step_seconds"].items())
    return "\n".join([*lines, f"Seconds: {times}"])


@torch.inference_mode()
def attention_of(model: LarvSegModel, sample: Sample, labels: Sequence[int]) -> np.ndarray:
    """Make the attention maps that the auxiliary loss has for the labels of an image.

    Args:
        model: with a memory bank.
        sample: with ``image``.
        labels: class indices, all that the image is known to show: each is background to the
            others.

    Returns:
        (labels, h, w) in (0, 1); NaN for a class of which the bank has no image.
    """
    network = model.network
    tokens = network(model.preprocess([sample]))
    distinct = sorted(set(labels))
    pairs = label_pairs([distinct], model.num_classes, tokens.device)
    known = network.bank.seen(pairs.classes)
    maps = attention_maps(tokens, pairs, network.bank.class_means(pairs.classes), known)
    maps[~known] = torch.nan
    rows = [distinct.index(label) for label in labels]
    return maps[rows].unflatten(1, tokens.shape[-2:]).float().cpu().numpy()


def draw_larvseg(
    path: Path,
    models: Mapping[str, LarvSegModel],
    test: LabelledImages,
    novel: Collection[str],
) -> None:
    """Draw validation images: attention of one label, the label maps of the models, the truth.

    Attention maps are those of the first model with a memory bank, if there is one; names of
    ``novel`` classes are shown first.
    """
    names = test.class_names
    attentive = next((m for m in models.values() if m.network.bank is not None), None)
    is_novel = [name in novel for name in names]
    test = replace(test, records=_varied(test.records, is_novel))
    predicted = {
        name: [result["sem_seg"].cpu().numpy() for _, result in predict_larvseg(model, test)]
        for name, model in models.items()
    }
    style = {"num_classes": len(names), "names": names, "side": _TILE_SIDE}
    tiles, titles, drawn = [], [], []
    for row, record in enumerate(test.records):
        sample = read_image_sample(record)
        image = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())
        labels = record["image_labels"]
        # A novel class if there is one, rather one that no row above has.
        shown = min(labels, key=lambda label: (not is_novel[label], label in drawn))
        drawn.append(shown)
        tiles.append(plain_tile(image, _TILE_SIDE))
        if attentive is not None:
            classes = [attentive.class_names.index(names[label]) for label in labels]
            attention = attention_of(attentive, sample, classes)[labels.index(shown)]
            tiles.append(draw_heat_map(image, attention, symmetric=False, side=_TILE_SIDE))
        maps = [found[row] for found in predicted.values()]
        maps.append(true_label_map(record, names))
        tiles += [draw_label_map(image, label_map, **style) for label_map in maps]
        side = "novel" if is_novel[shown] else "base"
        titles.append(f"attention for: {names[shown]} ({side} class)")
    columns = ["image", *predicted, "truth"]
    if attentive is not None:
        columns.insert(1, "attention")
    sheet = contact_sheet(
        tiles,
        columns=len(columns),
        row_titles=titles if attentive is not None else (),
        column_titles=columns,
        legend=(((253, 231, 37), "attention: most"), ((150, 150, 150), "hatched: unknown")),
    )
    save_png(path, sheet)


def _varied(records: Sequence[Record], is_novel: Sequence[bool]) -> list[Record]:
    """Choose images whose novel classes are not shown yet."""
    novel_of = {
        record["image_id"]: {label for label in record["image_labels"] if is_novel[label]}
        for record in records
    }
    chosen: list[Record] = []
    shown: set[int] = set()
    rest = [record for record in records if record["image_labels"]]
    while rest and len(chosen) < _FIGURE_ROWS:
        best = max(rest, key=lambda record: len(novel_of[record["image_id"]] - shown))
        rest.remove(best)
        chosen.append(best)
        shown |= novel_of[best["image_id"]]
    return chosen
