"""ConceptMask on pip alone: from data to three trainings, measures and a picture."""

import functools
import itertools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskx.core.checks import default_of
from maskx.core.digests import network_hash
from maskx.core.word_table import WordTable, save_word_table, spelled
from maskx.data.coco import CocoData, load_coco
from maskx.data.scenes.concepts import generate_concept_scenes, write_scene_tags
from maskx.data.tag_lists import TagList, read_tag_list, tag_list
from maskx.engine.batches import training_batches
from maskx.engine.checkpoints import write_checkpoint
from maskx.engine.options import QuickstartOptions, check_options
from maskx.engine.quickstart import (
    SCENE_SIZE,
    VAL_SCENES,
    choose_image_size,
    load_data,
    load_split_data,
    write_metrics,
)
from maskx.engine.runs import Origin, Run, link_run, origin_of, origins_of_data
from maskx.engine.training import CHECKPOINT_NAME, read_checkpoint, select_device
from maskx.engine.training_chain import TrainingChain, start_of
from maskx.supervision import CategorySplit
from maskx.systems.concept_mask.concept_sets import (
    ConceptSplit,
    concept_sets,
    read_concept_split,
    scene_concept_split,
)
from maskx.systems.concept_mask.evaluation import (
    LEVELS,
    ConceptTest,
    concept_test,
    evaluate_concepts,
    evaluate_existence,
    fit_concepts,
    format_concept_table,
)
from maskx.systems.concept_mask.model import SYSTEM_NAME, EmbeddingModel, RefinementModel
from maskx.systems.concept_mask.overlap import concept_overlap, negative_weights
from maskx.systems.concept_mask.predictor import ConceptPredictor, ConceptRow, draw_concepts
from maskx.systems.concept_mask.samples import ConceptMapper, Record, read_sample
from maskx.systems.concept_mask.system import (
    STAGE_FOLDERS,
    UNSEEN_NAME,
    WORDS_NAME,
    ConceptNetwork,
    build_model,
    open_model,
)
from maskx.systems.concept_mask.tag_vectors import fold_in_words, learn_word_vectors

CONCEPT_SCENES, TAG_SCENES = 2000, 4000

# Peaks of Adam: of the embedding from random weights and from ImageNet's, in stage 1 and in stage
# 2; of the refinement; of the segmentation. At 1e-3 in stage 2 the embedding forgets its words: of
# unseen ones 8.5% of the maps of Eq. 1 then point right, by chance 10%, at 1e-4 30%.
_EMBEDDING_RATES = {"random": 4e-3, "imagenet": 1e-4}
_FINE_TUNING_RATES = {"random": 3e-4, "imagenet": 3e-5}
_REFINEMENT_RATE, _SEGMENTATION_RATE = 2e-3, 1e-3
_FITTING_SHARE, _MAX_FITTING = 0.1, 150
# Rows of the picture by level; most for what has neither boxes nor masks.
_FIGURE_ROWS = {"mask": 1, "box": 2, "image": 3, "unseen": 2}
_TRAINED_WITH = {"mask": "masks", "box": "boxes", "image": "tags only", "unseen": "unseen word"}


@dataclass(frozen=True)
class ConceptMaskSettings:
    """What a chain of trainings is defined by.

    Attributes:
        embedding_iterations: steps of stage 1; the others are of stages 2 and 3.
        max_concepts: most concepts of an image in a step of stage 3.
        matching_weight: c of Eq. 2.
        seed: of weights and data order.
        feature_cache: see :class:`maskx.engine.options.QuickstartOptions`.
        workers: processes that read training images; 0 reads them in the process that trains.
    """

    network: ConceptNetwork = field(default_factory=ConceptNetwork)
    embedding_iterations: int = 1200
    refinement_iterations: int = 1000
    segmentation_iterations: int = 400
    batch_size: int = 16
    max_concepts: int = default_of(ConceptMapper, "max_concepts")
    matching_weight: float = default_of(RefinementModel, "matching_weight")
    feature_cache: float = QuickstartOptions.feature_cache
    seed: int = 0
    workers: int = 0

    @property
    def frozen(self) -> bool:
        """Whether the backbone of the embedding stays as it is."""
        return self.network.frozen


QUICK = ConceptMaskSettings(
    network=ConceptNetwork(
        backbone="small",
        hidden_channels=(256, 256),
        refinement_channels=256,
        image_size=128,
        embedding_size=64,
        attention_sizes=(64, 128),
        encoder="small",
        decoder_channels=(64, 48, 32, 24, 16),
    ),
    max_concepts=2,
    # The paper's 1e-6 is for 800 maps; half of a vocabulary of 66 and maps of 64 cells have a
    # hundredth of their terms.
    matching_weight=1e-4,
)
"""Settings of the quick start, for images of 128 pixels and a CPU."""


_DISCRIMINATION_WEIGHT = default_of(RefinementModel, "discrimination_weight")


@dataclass(frozen=True)
class ConceptMaskMethod:
    """What may be different between the chains of a study.

    Attributes:
        final_relu: the embedding ends with a ReLU, as the paper has it.
        discrimination_weight: of the spatial discrimination loss in stage 2; 0 leaves it out, and
            with it the negatives.
        two_sizes: the segmentation network sees attention maps of two image sizes, or the map of
            the first twice.
    """

    final_relu: bool = False
    discrimination_weight: float = _DISCRIMINATION_WEIGHT
    two_sizes: bool = True

    def folder(self, stage: int) -> str:
        """Name of a stage's folder: the stage and what differs from the default up to it."""
        words = [STAGE_FOLDERS[stage - 1]]
        if self.final_relu:
            words.append("final_relu")
        if stage >= 2 and self.discrimination_weight != _DISCRIMINATION_WEIGHT:
            words.append(f"discrimination_{self.discrimination_weight:g}")
        if stage >= 3 and not self.two_sizes:
            words.append("one_size")
        return "_".join(words)


@dataclass(frozen=True, eq=False)
class ConceptData:
    """What a chain of trainings learns from and is measured on.

    Attributes:
        train: images of which training may see what the split says.
        fitting: images of no training. Theta and the existence thresholds are fitted on them,
            with their true masks of image-level concepts and all their tags of the vocabulary; not
            with anything of an unseen concept.
        val: images with true masks.
        unseen: vectors of the concepts that are not in it.
        tags: images, in the folder `tag_images`, to learn tags from; None for those of `train`.
        files: what else all this is from, by what it is for.
    """

    train: CocoData
    fitting: CocoData
    val: CocoData
    split: ConceptSplit
    table: WordTable
    unseen: WordTable | None = None
    tags: TagList | None = None
    tag_images: str = ""
    files: Mapping[str, Path] = field(default_factory=dict)

    def test(self, data: CocoData) -> ConceptTest:
        """Take images to measure on."""
        known = (self.split, self.table, self.unseen)
        return concept_test(data.records, data.class_names, *known, source=str(data.json_file))


class ConceptMaskChain(TrainingChain):
    """The trainings of one seed: stage 1 learns from tags, stage 2 from boxes, stage 3 from masks.

    Each leaves its checkpoint in a folder of its own, and methods that do not differ up to a stage
    share it. The word tables are saved beside them.
    """

    def __init__(
        self,
        data: ConceptData,
        settings: ConceptMaskSettings,
        *,
        output: Path,
        resume: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.table, self.split = data.table, data.split
        self.sets = concept_sets(
            data.split,
            tags=data.tags or data.train,
            boxes=data.train,
            masks=data.train,
            tag_images=data.tag_images,
        )
        self._records = (self.sets.tagged, self.sets.boxed, self.sets.masked)
        folder = output / "stage"
        files = {name: origin_of(file, folder) for name, file in data.files.items()}
        run = Run(
            system=SYSTEM_NAME,
            host="pip",
            class_names=self.split.vocabulary,
            settings={
                "boxed concepts": self.split.boxed,
                "masked concepts": self.split.masked,
                "images": [*map(len, self._records)],
            },
            started_from={
                **origins_of_data(data.train, folder),
                **files,
                "word table": Origin(self.table.hash),
            },
        )
        super().__init__(settings, output=output, resume=resume, run=run, device=device)
        self._tables = {WORDS_NAME: data.table, UNSEEN_NAME: data.unseen}
        self._models: dict[str, EmbeddingModel] = {}
        self._hashes: dict[str, str] = {}

    def model(self, stage: int, method: ConceptMaskMethod | None = None) -> EmbeddingModel:
        """Return the model of a stage, in evaluation mode; it is trained if need be."""
        method = method or ConceptMaskMethod()
        name = method.folder(stage)
        if name not in self._models:
            self._models[name] = self._train_stage(stage, method)
        return self._models[name]

    @functools.cached_property
    def _gamma(self) -> Any:
        """Weights of Eq. 4, as CSR."""
        overlap = concept_overlap(self.sets.boxed, len(self.table))
        return tuple(torch.from_numpy(part) for part in negative_weights(overlap))

    def _train_stage(self, stage: int, method: ConceptMaskMethod) -> EmbeddingModel:
        settings, split, name = self.settings, self.split, method.folder(stage)
        before = self.model(stage - 1, method) if stage > 1 else None
        network = replace(settings.network, final_relu=method.final_relu)
        if stage == 3 and not method.two_sizes:
            network = replace(network, attention_sizes=(network.attention_sizes[0],) * 2)
        made_with: dict[str, Any] = {}
        gamma = {}
        if stage == 2:
            made_with["matching_weight"] = settings.matching_weight
            if method.discrimination_weight:
                made_with["discrimination_weight"] = method.discrimination_weight
                gamma = {"gamma": self._gamma}
        torch.manual_seed(settings.seed)
        model = build_model(
            network, stage, self.table, split, initial=stage == 1, **made_with, **gamma
        )
        start = {}
        if before is not None:
            model.train().load_state_dict(before.state_dict())
            start = {"start": self._hashes[method.folder(stage - 1)]}
        self._keep_features(model.embedding.backbone)
        if stage == 2:
            # The copy that stays as it was has the same frozen backbone, if it is frozen.
            model.original.backbone.cache = model.embedding.backbone.cache
        if stage == 3:
            made_with["max_concepts"] = settings.max_concepts
        mapper = ConceptMapper(
            stage,
            size=network.image_size if stage == 3 else network.embedding_size,
            attention_sizes=network.attention_sizes,
            masked=split.masked_indices,
            max_concepts=settings.max_concepts,
        )
        weights = start_of(network.pretrained, network.frozen)
        rates = (_EMBEDDING_RATES[weights], _REFINEMENT_RATE, _SEGMENTATION_RATE)
        slower = {"embedding.": _FINE_TUNING_RATES[weights] / _REFINEMENT_RATE}
        self._train(
            model,
            name,
            functools.partial(training_batches, self._records[stage - 1], mapper),
            {},
            model_settings={"network": asdict(network), **made_with},
            started_from=start,
            iterations=getattr(settings, f"{STAGE_FOLDERS[stage - 1]}_iterations"),
            rate=rates[stage - 1],
            lr_multipliers=slower if stage == 2 else None,
            description=f"stage {stage}: {name}",
        )
        # Not before: a checkpoint of another table would lose its own.
        for file_name, table in self._tables.items():
            if table is not None:
                save_word_table(self.output / file_name, table)
        # Before anything is fitted, which is no part of what the next stage starts from.
        self._hashes[name] = network_hash(model)
        return model


def scene_concept_data(
    folder: Path, *, num_train: int, num_val: int, num_tags: int, size: int, seed: int
) -> ConceptData:
    """Generate scenes with concepts of every level, and learn word vectors from tags of others.

    Args:
        num_tags: lists of tags, of scenes of which there is no image. Of the same lists with the
            names of the unseen concepts, the vectors of these are folded in.
    """
    files = []
    for part, (name, count) in enumerate((("train", num_train), ("val", num_val))):
        json_file = generate_concept_scenes(
            folder / name, count=count, size=size, seed=3 * seed + part, progress=True
        )
        files.append(load_coco(json_file, folder / name))
    split = scene_concept_split()
    tags, all_tags = (
        write_scene_tags(
            folder / name, count=num_tags, seed=3 * seed + 2, unseen=unseen, progress=True
        )
        for name, unseen in (("tags.jsonl", False), ("tags_unseen.jsonl", True))
    )
    data = _concept_data(*files, split, read_tag_list(tags, vocabulary=split.vocabulary))
    folded = fold_in_words(data.table, read_tag_list(all_tags), split.unseen)
    return replace(data, unseen=folded.table)


def coco_concept_data(train: CocoData, val: CocoData, split: CategorySplit) -> ConceptData:
    """Take the categories of a file as concepts, all with tags and boxes and some with masks.

    Word vectors are learned from which categories are in the training images together; a category
    that is in none with another one has no vector and is left out.
    """
    labels = (record["image_labels"] for record in train.records)
    paired = {label for each in labels if len(each) > 1 for label in each}
    if not paired:
        raise ValueError(
            f"'{train.json_file}' has no two categories in one image, so no word vectors can be "
            "learned from its tags. Give images with more tags."
        )
    names = [train.class_names[label] for label in sorted(paired)]
    masked = [name for name in names if name in set(split.with_masks)]
    left_out = [name for name in train.class_names if name not in set(names)]
    concepts = ConceptSplit(vocabulary=names, boxed=names, masked=masked, unseen=left_out)
    return _concept_data(train, val, concepts, _tags_of(train))


def own_concept_data(
    train: CocoData,
    val: CocoData,
    split_file: str | Path,
    *,
    tags: TagList | None = None,
    tag_images: str = "",
) -> ConceptData:
    """Take concepts of three levels from own files: masks of some, boxes of others, tags of all.

    Categories that are not in the vocabulary are withheld from training.

    Args:
        train: images with boxes and masks, and with tags where there is no list of them.
        split_file: see :func:`read_concept_split`; its vocabulary is that of the tags if it lists
            none.
        tags: of images in the folder `tag_images`; those of `train` without.
    """
    tags_here = tags or _tags_of(train)
    counts = tags_here.counts()
    tagged = [name for name, count in zip(tags_here.names, counts, strict=True) if count]
    split = read_concept_split(split_file, default=tagged)
    known = {*split.vocabulary, *split.unseen}
    others = (name for name in map(spelled, train.class_names) if name not in known)
    split = replace(split, unseen=(*split.unseen, *others))
    files = {"concept_split": split_file} | ({} if tags is None else {"tags": tags.source})
    data = _concept_data(train, val, split, tags_here, files=files)
    return replace(data, tags=tags, tag_images=os.fspath(tag_images))


def _tags_of(data: CocoData) -> TagList:
    labels = [record["image_labels"] for record in data.records]
    return tag_list(labels, data.class_names, source=str(data.json_file))


def _concept_data(
    data: CocoData,
    val: CocoData,
    split: ConceptSplit,
    tags: TagList,
    files: Mapping[str, str | Path] | None = None,
) -> ConceptData:
    """Learn the vectors of the vocabulary; keep the last images out of the training, to fit on."""
    place = {name: index for index, name in enumerate(split.vocabulary)}
    places = [place.get(name) for name in tags.names]
    labels = ([places[tag] for tag in tags.tags_of(n)] for n in range(len(tags)))
    known = ([index for index in each if index is not None] for each in labels)
    table = learn_word_vectors(tag_list(known, split.vocabulary, source=tags.source))
    train, fitting = _without_fitting(data)
    return ConceptData(train, fitting, val, split, table, files=files or {})


def _without_fitting(data: CocoData) -> tuple[CocoData, CocoData]:
    count = min(_MAX_FITTING, max(1, round(_FITTING_SHARE * len(data.records))))
    train, fitting = data.records[:-count], data.records[-count:]
    return replace(data, records=train), replace(data, records=fitting)


def learn_concept_mask(
    data: ConceptData,
    settings: ConceptMaskSettings,
    *,
    output: Path,
    resume: bool = False,
    device: torch.device,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Train the three stages, fit theta and thresholds, evaluate each level and draw concepts.

    `report` receives the lines for the reader.

    Returns:
        ``levels``: measures of the final masks and maps by level; ``concepts``: by concept;
        ``original``: by level those of the maps of stage 1, whose masks are the maps above 0.5.
        Unseen words are measured by Eq. 1 alone and, as ``unseen_blended``, blended;
        ``existence``, ``fitted``, ``num_images`` and ``step_seconds``.
    """
    chain = ConceptMaskChain(data, settings, output=output, resume=resume, device=device)
    counts = {name: len(getattr(chain.sets, name)) for name in ("tagged", "boxed", "masked")}
    report(
        f"{counts['tagged']} training images with tags of {len(data.split.vocabulary)} concepts, "
        f"{counts['boxed']} with boxes of {len(data.split.boxed)}, {counts['masked']} with masks "
        f"of {len(data.split.masked)}; {len(data.split.unseen)} concepts are unseen"
    )
    link_run(output, STAGE_FOLDERS[-1])
    test = data.test(data.val)
    models = {stage: chain.model(stage) for stage in (1, 2, 3)}
    with chain.timed("fitting"):
        fitted = fit_concepts(models[3], data.test(data.fitting))
        save_fitted(models[3], output / STAGE_FOLDERS[-1])
    with chain.timed("evaluation"):
        found = evaluate_concepts(models[3], test, description="evaluation")
        original = evaluate_concepts(models[1], test, description="stage 1: evaluation")
        existence = evaluate_existence(models[3], test)
    with chain.timed("picture"):
        predictor, stage_1 = ConceptPredictor(models[3]), ConceptPredictor(models[1])
        draw_test_concepts(output / "predictions.png", predictor, stage_1, test)
    metrics = {
        **found,
        "original": original["levels"],
        "existence": existence,
        "fitted": fitted,
        "num_images": counts,
        "step_seconds": {name: round(value, 1) for name, value in chain.seconds.items()},
    }
    report("\n" + format_concept_mask(metrics))
    return metrics


def format_concept_mask(metrics: Mapping[str, Any]) -> str:
    """Lay out the measures in tables."""
    times = ", ".join(f"{name} {value:.0f}" for name, value in metrics["step_seconds"].items())
    absent = [level for level in LEVELS if metrics["levels"][level] is None]
    lines = ["Masks, and the attention maps they are made from:"]
    lines += [format_concept_table(metrics), "Attention maps of stage 1, masks above 0.5 of them:"]
    lines.append(format_concept_table({"levels": metrics["original"]}))
    if absent:
        lines.append(f"No concept to measure of level {', '.join(absent)}.")
    found = metrics["existence"]
    thetas = (metrics["fitted"][key] for key in ("theta_image", "theta_unseen"))
    shown = ["not fitted" if theta is None else f"{theta:.2f}" for theta in thetas]
    lines.append(
        f"Share of the own map in a blend, theta: {shown[0]} for concepts with tags only, "
        f"{shown[1]} for unseen words that are blended"
    )
    lines.append(
        f"Concepts said to exist: precision {found['precision']:.3f}, recall {found['recall']:.3f}"
    )
    return "\n".join([*lines, f"Seconds: {times}"])


def draw_test_concepts(
    path: Path, predictor: ConceptPredictor, stage_1: ConceptPredictor, test: ConceptTest
) -> None:
    """Draw concepts of every level: image, map of stage 1, refined map, mask and truth.

    Every row is of another image. Where no image shows a concept, nothing is drawn.
    """
    rows: list[ConceptRow] = []
    used: set[int | str] = set()
    for level, count in _FIGURE_ROWS.items():
        of_level = [c for c, each in enumerate(test.levels) if each == level]
        # Spread over the list, whose neighbours are of one kind; then those between.
        step = max(1, len(of_level) // count)
        for concept in itertools.chain(*(of_level[start::step] for start in range(step))):
            if count == 0:
                break
            record, truth = _largest(test, concept, used)
            if record is None:
                continue
            count -= 1
            used.add(record["image_id"])
            image = np.ascontiguousarray(read_sample(record)["image"].permute(1, 2, 0).numpy())
            asked = test.vectors[concept] if test.indices[concept] < 0 else test.names[concept]
            (found,), (first,) = (each(image, [asked]).values() for each in (predictor, stage_1))
            rows.append(
                ConceptRow(
                    f"{test.names[concept]} ({_TRAINED_WITH[level]})",
                    image,
                    maps={"stage 1": first.attention, "refined": found.attention},
                    masks={"mask": found.mask, "truth": truth},
                )
            )
    if rows:
        draw_concepts(path, rows)


def _largest(
    test: ConceptTest, concept: int, used: set[int | str]
) -> tuple[Record | None, np.ndarray | None]:
    """Find the image, not yet used, in which a concept is largest, and its truth there."""
    best, best_truth, best_share = None, None, 0.0
    for record in test.records:
        if record["image_id"] in used or concept not in record["image_labels"]:
            continue
        truth = test.truths(record).get(concept)
        if truth is not None and truth.mean() > best_share:
            best, best_truth, best_share = record, truth, truth.mean()
    return best, best_truth


def save_fitted(model: EmbeddingModel, folder: Path) -> None:
    """Write what was fitted to the model of a checkpoint into it, whole or not at all."""
    content = read_checkpoint(folder / CHECKPOINT_NAME, "cpu")
    content["model"] = model.state_dict()
    write_checkpoint(folder / CHECKPOINT_NAME, content)


def fit_run(
    run: str | Path,
    json_file: str | Path,
    image_root: str | Path,
    *,
    strict: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Fit theta and the thresholds of a finished run, and write them to its checkpoint.

    Args:
        json_file: COCO-format file with tags and true masks of concepts.
        strict: see :func:`maskx.data.coco.load_coco`.

    Returns:
        What :func:`fit_concepts` returns.
    """
    model = open_model(run, device=device)
    data = load_coco(json_file, image_root, strict=strict)
    source = str(data.json_file)
    test = concept_test(data.records, data.class_names, model.split, model.table, source=source)
    fitted = fit_concepts(model, test)
    save_fitted(model, Path(run) / STAGE_FOLDERS[-1])
    return fitted


def quickstart_concept_mask(
    options: QuickstartOptions, report: Callable[[str], None]
) -> dict[str, Any]:
    """Learn ConceptMask, from data to ``metrics.json``, which is returned, and a picture.

    Generated scenes have concepts of every level. Of COCO files all categories have tags and boxes,
    and those that ``masks_for`` names have masks; or ``concept_split`` says what has boxes and what
    masks, and all else, of ``tags`` too, has tags only. See :func:`learn_concept_mask`.
    """
    started = time.perf_counter()
    check_options(SYSTEM_NAME, options)
    check_own_data(options)
    device = select_device(options.device)
    settings = quick_settings(options)
    options.output.mkdir(parents=True, exist_ok=True)
    data = load_concept_data(options)
    report(
        f"{len(data.train.records)} training images, {len(data.fitting.records)} to fit "
        f"thresholds, {len(data.val.records)} validation images, on {device}"
    )
    metrics: dict[str, Any] = {"system": SYSTEM_NAME}
    metrics |= learn_concept_mask(
        data,
        settings,
        output=options.output,
        resume=options.resume,
        device=device,
        report=report,
    )
    split = data.split
    metrics["split"] = {
        name: list(getattr(split, name)) for name in ("vocabulary", "boxed", "masked", "unseen")
    }
    return write_metrics(options, metrics, data=data.val, started=started, report=report)


def quick_settings(options: QuickstartOptions) -> ConceptMaskSettings:
    """Return what a chain of trainings with options of the quick start is defined by."""
    size = choose_image_size(options)
    half = max(1, size // 2)  # of the images that it is trained on, and of the first map
    network = replace(
        QUICK.network,
        backbone=options.backbone,
        pretrained=options.pretrained,
        frozen=options.frozen,
        image_size=size,
        embedding_size=half,
        attention_sizes=(half, size),
    )
    chosen = {f"{stage}_iterations": options.iterations for stage in STAGE_FOLDERS}
    chosen["batch_size"] = options.batch_size
    chosen = {name: value for name, value in chosen.items() if value is not None}
    own = {name: getattr(options, name) for name in ("seed", "workers", "feature_cache")}
    return replace(QUICK, network=network, **own, **chosen)


def load_concept_data(options: QuickstartOptions) -> ConceptData:
    """Generate the scenes of the seed, in the output folder, or read COCO files."""
    if options.coco_train is None and options.coco_val is None:
        return scene_concept_data(
            options.output / "scenes",
            num_train=CONCEPT_SCENES,
            num_val=VAL_SCENES,
            num_tags=TAG_SCENES,
            size=SCENE_SIZE,
            seed=options.seed,
        )
    if options.concept_split is None:
        return coco_concept_data(*load_split_data(options, "coco_voc"))
    train, val = load_data(options)
    tags, images = options.tags or (None, "")
    if tags is not None:
        tags = read_tag_list(tags, strict=not options.skip_bad)
    return own_concept_data(train, val, options.concept_split, tags=tags, tag_images=images)


def check_own_data(options: QuickstartOptions) -> None:
    """Refuse options of own data that contradict each other, or are given without it."""
    given = {name: getattr(options, name) for name in ("masks_for", "concept_split", "tags")}
    given = [name for name, value in given.items() if value is not None]
    if given and options.coco_train is None:
        raise ValueError(
            f"{given[0]} has no meaning for generated scenes with concepts, whose levels are "
            "fixed. Leave it out, or give COCO files."
        )
    if "tags" in given and "concept_split" not in given:
        raise ValueError("tags needs a concept_split, which says what has boxes and masks.")
    if "masks_for" in given and "concept_split" in given:
        raise ValueError("masks_for and concept_split both say what has masks. Give one of them.")
