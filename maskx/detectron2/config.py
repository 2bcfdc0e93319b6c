"""Configuration keys of maskx for Detectron2's YAML files."""

import inspect
import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.utils.file_io import PathManager

from maskx.core.checks import default_of
from maskx.core.files import parse_yaml
from maskx.systems.class_patterns.model import LargeFOVHead, SampleSegmenter
from maskx.systems.concept_mask.model import EmbeddingModel, RefinementModel
from maskx.systems.concept_mask.network import (
    AttentionRefinement,
    ConceptEmbedding,
    ConceptSegmenter,
    build_encoder,
)
from maskx.systems.concept_mask.samples import ConceptMapper
from maskx.systems.larvseg.network import LarvSeg
from maskx.systems.maskx_rcnn.detectron2.heads import MaskXMaskHead, TextClassifier
from maskx.systems.maskx_rcnn.mask_head import MaskXHead
from maskx.systems.maskx_rcnn.samples import InstanceMapper
from maskx.systems.maskx_rcnn.weak_losses import MAX_BOX_ROIS, BoxMaskLoss, EMATeacher
from maskx.systems.maskx_rcnn.weight_transfer import WeightTransfer
from maskx.systems.transfernet.model import build_network

_MAX_VALUES = 100_000  # of a configuration; those of Detectron2 have 500


def get_cfg() -> CN:
    """Make Detectron2's default configuration with the keys of maskx added."""
    cfg = get_detectron2_cfg()
    add_maskx_config(cfg)
    return cfg


def add_maskx_config(cfg: CN) -> None:
    """Add the keys of maskx. Keys that are there already, and upstream defaults, stay as they are.

    It may therefore be called twice, after other projects' functions, or on a loaded config.
    """
    _add_missing(cfg, _defaults())


def _defaults() -> CN:
    keys = CN()

    keys.MODEL = CN()
    keys.MODEL.MASKX = CN()
    # What predicts the mask of a class: "transfer" (Mask^X: weights predicted from the weights of
    # the box predictor), "class_agnostic" (the baseline: one mask for every class) or
    # "class_specific" (Mask R-CNN: learned weights per class, the oracle where all have masks).
    keys.MODEL.MASKX.PREDICTOR = default_of(MaskXHead, "predictor")
    # Fully connected branch whose logits are added (section 3.3): "none", "single_fc" (the
    # paper's; 157.4 M parameters at 256 channels and 28 x 28) or "bottleneck" (4.9 M).
    keys.MODEL.MASKX.MLP = default_of(MaskXHead, "mlp")
    # Layers before the upsampling: "conv" (ROI_MASK_HEAD.NUM_CONV convolutions, the paper's),
    # "residual" (NUM_CONV convolutions in residual pairs) or "hourglass" (one hourglass of
    # residual pairs, NUM_CONV convolutions per resolution and direction). The latter two need an
    # even NUM_CONV, "hourglass" also a ROI_MASK_HEAD.POOLER_RESOLUTION of at least 7.
    keys.MODEL.MASKX.TRUNK = default_of(MaskXHead, "trunk")
    # True: the mask branch trains on ground-truth boxes instead of the sampled proposals (found
    # to help classes without masks by Deep-MAC, Birodkar et al., ICCV 2021).
    keys.MODEL.MASKX.GT_BOXES_ONLY = False
    # True: only the mask branch trains, the detector stays as it was loaded (the second stage of
    # stage-wise training, section 2.2). Needs META_ARCHITECTURE "MaskXRCNN".
    keys.MODEL.MASKX.FREEZE_DETECTOR = False
    # The mask loss of objects without a mask, by their boxes and the colours of the image (BoxInst,
    # Tian et al., CVPR 2021); beyond the paper, which leaves them out of the mask branch.
    keys.MODEL.MASKX.BOX_LOSS = CN()
    keys.MODEL.MASKX.BOX_LOSS.WEIGHT = 0.0
    # Iterations over which the weight of its pairwise term rises; 11 % of a training in BoxInst.
    keys.MODEL.MASKX.BOX_LOSS.WARM_UP = default_of(BoxMaskLoss, "warm_up")
    # Distance of neighbours that are compared, in cells of the mask.
    keys.MODEL.MASKX.BOX_LOSS.DILATION = default_of(BoxMaskLoss, "dilation")
    # They are alike where exp(-distance of their Lab colours / 2) is at least this.
    keys.MODEL.MASKX.BOX_LOSS.MIN_SIMILARITY = default_of(BoxMaskLoss, "min_similarity")
    # The mask loss of objects without a mask, by masks that a moving average of the model makes in
    # their boxes (after BoxTeacher, Cheng et al., CVPR 2023); beyond the paper, like the box loss.
    # Needs META_ARCHITECTURE "MaskXRCNN".
    keys.MODEL.MASKX.EMA_TEACHER = CN()
    keys.MODEL.MASKX.EMA_TEACHER.WEIGHT = 0.0
    # Share of the average that an iteration keeps.
    keys.MODEL.MASKX.EMA_TEACHER.DECAY = default_of(EMATeacher, "decay")
    # Masks of a lower quality, from 0 to 1, teach nothing; the others weigh by it.
    keys.MODEL.MASKX.EMA_TEACHER.MIN_QUALITY = default_of(EMATeacher, "min_quality")
    # Iterations over which the weight rises.
    keys.MODEL.MASKX.EMA_TEACHER.WARM_UP = default_of(EMATeacher, "warm_up")
    # RoIs without a mask that box loss and EMA teacher train on, per image.
    keys.MODEL.MASKX.MAX_BOX_ROIS = MAX_BOX_ROIS
    # Above 0: images with image labels alone train the classifier of the detector, by their largest
    # proposal (Detic, Zhou et al., ECCV 2022; 0.1 there). Else they are left out. Needs
    # META_ARCHITECTURE "MaskXRCNN" and PROPOSAL_GENERATOR.NAME "MaskXRPN".
    keys.MODEL.MASKX.TAG_LOSS_WEIGHT = 0.0
    # What masks that nobody drew (`maskx complete`) weigh in the mask loss: "quality", which they
    # have in the file, or "one", as drawn ones.
    keys.MODEL.MASKX.PSEUDO_WEIGHT = default_of(InstanceMapper, "pseudo_weight")
    # Multiplier of the mask loss; 1 in the paper.
    keys.MODEL.MASKX.LOSS_WEIGHT = default_of(MaskXMaskHead, "loss_weight")

    # The weight transfer function T of Eq. 1; used by the predictor "transfer" only.
    keys.MODEL.MASKX.TRANSFER = CN()
    # What describes a class, w_det: "cls" (classifier row), "box" (box regressor row), "cls+box"
    # (both), "vectors" (fixed vectors from a file) or "randn" (fixed random vectors).
    keys.MODEL.MASKX.TRANSFER.INPUTS = default_of(WeightTransfer, "inputs")
    # Number of fully connected layers of T: 1, 2 or 3.
    keys.MODEL.MASKX.TRANSFER.LAYERS = default_of(WeightTransfer, "num_layers")
    # Between the layers of T: "leaky_relu" (slope 0.1) or "relu".
    keys.MODEL.MASKX.TRANSFER.ACTIVATION = default_of(WeightTransfer, "activation")
    # True: the mask loss does not reach the box predictor through T (section 3.1).
    keys.MODEL.MASKX.TRANSFER.STOP_GRADIENT = default_of(WeightTransfer, "stop_gradient")
    # Above 0: at inference the mask weights of a class that no mask loss has taught are a mean of
    # those of the taught ones, by the softmax of their likeness at this temperature; 0: off, as in
    # the paper.
    keys.MODEL.MASKX.TRANSFER.MIX = default_of(WeightTransfer, "mix")
    # Share of the numbers of w_det that T does not see in a training step.
    keys.MODEL.MASKX.TRANSFER.DROPOUT = default_of(WeightTransfer, "dropout")
    # True: T sees w_det at length 1.
    keys.MODEL.MASKX.TRANSFER.NORMALISE = default_of(WeightTransfer, "normalise")
    # Length of a classifier row, where a box predictor of another code base gives its rows by a
    # method detector_weights(); 0: the length of the features that enter the box predictor.
    keys.MODEL.MASKX.TRANSFER.DETECTOR_CHANNELS = 0
    # For INPUTS "vectors": a file, or "minilm" or "glove" of the extra "text"; see
    # maskx.core.word_vectors.load_class_vectors.
    keys.MODEL.MASKX.TRANSFER.VECTORS = ""

    # Classify boxes by fixed vectors of the class names, as open-vocabulary detectors do. Needs
    # ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True; TRANSFER.INPUTS "cls" are then these vectors.
    keys.MODEL.MASKX.TEXT_CLASSIFIER = CN()
    # The vectors, likewise; "": a learned classifier.
    keys.MODEL.MASKX.TEXT_CLASSIFIER.VECTORS = ""
    # Class names by class index; []: those of the training data. Other names than those of the
    # training give a model that detects and segments other classes with the same checkpoint.
    keys.MODEL.MASKX.TEXT_CLASSIFIER.CLASSES = []
    # Multiplier of the cosine between features and vectors; 50 in Detic.
    keys.MODEL.MASKX.TEXT_CLASSIFIER.TEMPERATURE = default_of(TextClassifier, "temperature")

    # Classes, without the background, of image classifiers and of semantic segmentation.
    # Detectors have ROI_HEADS.NUM_CLASSES.
    keys.MODEL.MASKX.NUM_CLASSES = 20
    # Feature map of the backbone that these read; "": its last. What comes after it is left out.
    keys.MODEL.MASKX.IN_FEATURE = ""
    # What MODEL.BACKBONE.NAME MaskXSmallResNet, MaskXVGG16, MaskXTimm and MaskXTimmFPN read.
    keys.MODEL.MASKX.BACKBONE = CN()
    # Model of timm, with or without the tag of its weights (MaskXTimm, MaskXTimmFPN).
    keys.MODEL.MASKX.BACKBONE.NAME = "resnet50"
    # Stride of the last feature map in pixels: 4, 8 or 16 (MaskXSmallResNet), 8 or 16 (MaskXVGG16),
    # 8, 16 or 32 (MaskXTimm). 0: that of the network, which is 8, 16, and for a ResNet 32.
    keys.MODEL.MASKX.BACKBONE.OUTPUT_STRIDE = 0
    # True: start from ImageNet weights, of an installed package (the extra "photos") or of timm's
    # hub; not where MODEL.WEIGHTS is set. Needs INPUT.FORMAT "RGB" and the PIXEL_MEAN and PIXEL_STD
    # that the weights expect.
    keys.MODEL.MASKX.BACKBONE.PRETRAINED = False
    # A file of weights to start from instead, safetensors or a state dict with timm's names.
    keys.MODEL.MASKX.BACKBONE.WEIGHTS = ""
    # How much stays as it was loaded: 0 nothing, 1 what comes before the first feature map, 2 the
    # first feature map, too; one more than there are maps: all. BACKBONE.FREEZE_AT is not read.
    keys.MODEL.MASKX.BACKBONE.FROZEN_STAGES = 0
    # True: batch norm keeps its statistics and its weights (MaskXTimm, MaskXTimmFPN).
    keys.MODEL.MASKX.BACKBONE.FROZEN_NORM = False
    # Probability that a block is skipped in training (MaskXTimm, MaskXTimmFPN).
    keys.MODEL.MASKX.BACKBONE.DROP_PATH = 0.0
    # The head of MaskXDeepLab: channels of its hidden layers, and the dilation of the first.
    keys.MODEL.MASKX.LARGE_FOV = _arguments_of(LargeFOVHead)

    # What MaskXTransferNet reads: the arguments of maskx.systems.transfernet.model.build_network in
    # capitals, with their defaults. Its classes are those of source and target, NUM_CLASSES.
    keys.MODEL.MASKX.TRANSFERNET = _arguments_of(build_network)
    # Checkpoint of a MaskXTransferClassifier (or MaskXImageClassifier) with the same backbone: its
    # backbone becomes the encoder, and it chooses the labels of an image at inference. Not read
    # where MODEL.WEIGHTS is set, since checkpoints of MaskXTransferNet hold both.
    keys.MODEL.MASKX.TRANSFERNET.CLASSIFIER_WEIGHTS = ""
    # IN_FEATURE of that classifier; "": the last.
    keys.MODEL.MASKX.TRANSFERNET.CLASSIFIER_FEATURE = ""

    # What MaskXLarvSeg reads: the arguments of maskx.systems.larvseg.network.LarvSeg, which says
    # what they mean. Its classes are those of the data sets; NUM_CLASSES is not read.
    keys.MODEL.MASKX.LARVSEG = _arguments_of(LarvSeg)
    # Registered data sets whose classes, united by name, make the class table; (): those of
    # DATASETS.TRAIN. Where both are (), the class list is that of the checkpoint MODEL.WEIGHTS.
    keys.MODEL.MASKX.LARVSEG.CLASSES_OF = ()

    # What MaskXConceptEmbedding, MaskXConceptRefinement and MaskXConceptSegmentation read: stage 1
    # learns from tags to embed images among word vectors, stage 2 from boxes to refine attention
    # maps, stage 3 from masks to segment; each starts from the one before (MODEL.WEIGHTS). Their
    # concepts are the words of the table; NUM_CLASSES is not read.
    keys.MODEL.MASKX.CONCEPT_MASK = CN()
    # File of the word table; see tools/learn_word_vectors.py.
    keys.MODEL.MASKX.CONCEPT_MASK.WORD_TABLE = ""
    # Which concepts have boxes, and which masks: a JSON file, see
    # maskx.systems.concept_mask.concept_sets.read_concept_split, or "scenes_concepts" for the
    # generated scenes.
    keys.MODEL.MASKX.CONCEPT_MASK.SPLIT = ""
    concept = keys.MODEL.MASKX.CONCEPT_MASK
    # Hidden channels of the embedding, and whether it ends with a ReLU, as the paper has it: no
    # embedding then has a negative entry, which word vectors do have.
    concept.EMBEDDING_CHANNELS = default_of(ConceptEmbedding, "hidden_channels")
    concept.FINAL_RELU = default_of(ConceptEmbedding, "final_relu")
    # Hidden channels of the refinement.
    concept.HIDDEN_CHANNELS = default_of(AttentionRefinement, "hidden_channels")
    # Sides in pixels of the squares that attention maps are made of, a map of each.
    concept.ATTENTION_SIZES = default_of(EmbeddingModel, "attention_sizes")
    # N and c of the matching loss (Eq. 2).
    concept.NUM_MATCHED = default_of(RefinementModel, "num_matched")
    concept.MATCHING_WEIGHT = default_of(RefinementModel, "matching_weight")
    # Weight of the spatial discrimination loss (Eq. 4), 0 for none, and the file of overlaps of
    # tools/concept_overlap.py that it needs.
    concept.DISCRIMINATION_WEIGHT = default_of(RefinementModel, "discrimination_weight")
    concept.OVERLAP = ""
    # Encoder of the segmentation network, see maskx.systems.concept_mask.network.build_encoder:
    # a ResNet or "small", with the widths of the latter; whether stage 3 starts it from ImageNet
    # weights, which are downloaded.
    concept.ENCODER = default_of(build_encoder, "name")
    concept.ENCODER_WIDTHS = default_of(build_encoder, "widths")
    concept.ENCODER_PRETRAINED = False
    concept.DECODER_CHANNELS = default_of(ConceptSegmenter, "decoder_channels")
    # Most concepts of an image in a step of stage 3, drawn at random.
    concept.MAX_CONCEPTS = default_of(ConceptMapper, "max_concepts")

    keys.INPUT = CN()
    keys.INPUT.MASKX = CN()
    # Side in pixels of the squares that image classifiers and semantic segmentation train on, and
    # that image classifiers predict on; images are warped to them. MaskXTransferNet predicts on
    # such squares too, but pads images to squares first instead of warping them. The segmentation
    # network of MaskXConceptSegmentation sees such squares, in training and in prediction.
    keys.INPUT.MASKX.SIZE = 328

    keys.DATASETS = CN()
    keys.DATASETS.MASKX = CN()
    # Which categories have masks (A); the masks of all others (B) are withheld in training. A
    # name of maskx.data.splits.split_names(), or a file; see maskx.data.splits.resolve_split.
    # MaskXTransferNet takes A as its source and B as its target categories; with two data sets in
    # DATASETS.TRAIN, the source and the target, it needs "all".
    keys.DATASETS.MASKX.SPLIT = "all"
    # Share of the source images that MaskXTransferNet learns from, in (0, 1], and the seed by which
    # they are drawn; a smaller share is part of a larger one of the same seed.
    keys.DATASETS.MASKX.SOURCE_FRACTION = 1.0
    keys.DATASETS.MASKX.SOURCE_SUBSET = 0
    # How MaskXLarvSeg learns from the data sets of DATASETS.TRAIN: one entry for each, in their
    # order, or () for the default.
    keys.DATASETS.MASKX.JOINT = CN()
    # "mask" (label maps) or "image" (image labels alone); (): "mask".
    keys.DATASETS.MASKX.JOINT.SUPERVISION = ()
    # Batches of each, such as (3, 3, 2); (): 1.
    keys.DATASETS.MASKX.JOINT.RATIOS = ()
    # Sides in pixels of the squares that it trains on; (): INPUT.MASKX.SIZE.
    keys.DATASETS.MASKX.JOINT.SIZES = ()
    # True where an image shows more than its one label says, as those of ImageNet; (): False.
    keys.DATASETS.MASKX.JOINT.SINGLE_LABEL = ()
    # False: labels of this data set are learned without attention, as in the paper's Table 4; ():
    # True.
    keys.DATASETS.MASKX.JOINT.ATTENTION = ()
    # True: image labels are those of the training crop's label map, as in the reference code of
    # LarvSeg. That is more than image-level supervision.
    keys.DATASETS.MASKX.JOINT.CROP_LEVEL_LABELS = False
    # Smallest side of a random crop as a share of the image's; 1: whole images.
    keys.DATASETS.MASKX.JOINT.MIN_CROP = 1.0
    # True: masks of target images are used where there are some. False: they are not read.
    keys.DATASETS.MASKX.USE_TARGET_MASKS = False
    # COCO-format data sets to register before training: [[name, json_file, image_root], ...].
    keys.DATASETS.MASKX.REGISTER = []
    # True: a bad box or mask in a data set of REGISTER is an error. False: it is left out and
    # counted; a bad mask leaves its box.
    keys.DATASETS.MASKX.STRICT = True

    keys.SOLVER = CN()
    keys.SOLVER.MASKX = CN()
    # "sgd" (Detectron2's own) or "adam".
    keys.SOLVER.MASKX.OPTIMIZER = "sgd"
    # Multiplier of the learning rate of the backbone.
    keys.SOLVER.MASKX.BACKBONE_LR_FACTOR = 1.0
    # False: a mean in a loss of maskx is over what all processes see. True: over what each sees
    # alone, as in most public code, so that a process without masks halves the mask loss of two.
    keys.SOLVER.MASKX.MEANS_PER_PROCESS = False
    # Power of SOLVER.LR_SCHEDULER_NAME "WarmupPolyLR", which goes from BASE_LR to BASE_LR_END.
    keys.SOLVER.MASKX.POLY_POWER = 0.9

    keys.TEST = CN()
    keys.TEST.MASKX = CN()
    # Sides in pixels of the squares to which MaskXDeepLab warps an image to predict it. The scores
    # of all sizes are averaged.
    keys.TEST.MASKX.SIZES = default_of(SampleSegmenter, "test_sizes")
    # True: a dense CRF refines what MaskXDeepLab and MaskXTransferNet predict. Needs the extra
    # "crf" of maskx.
    keys.TEST.MASKX.CRF = False
    # True: MaskXTransferNet segments the true image labels of a sample that has them, instead of
    # predicted ones (TransferNet-GT).
    keys.TEST.MASKX.GT_LABELS = False
    # Registered data set whose classes MaskXLarvSeg predicts; "": all of the class table. Where a
    # data set is evaluated, its own are predicted.
    keys.TEST.MASKX.CLASSES_OF = ""
    # Classes per pixel, best first, that MaskXLarvSeg returns.
    keys.TEST.MASKX.TOP_K = 1
    # Side in pixels of the windows that MaskXLarvSeg predicts an image by, and their stride; WINDOW
    # 0: the whole image. STRIDE 0: WINDOW. Logits are averaged where windows overlap.
    keys.TEST.MASKX.WINDOW = 0
    keys.TEST.MASKX.STRIDE = 0
    # Concepts that the networks of ConceptMask find in an image, by name; (): all that exist in it.
    keys.TEST.MASKX.CONCEPTS = ()
    # Words that are not in the table of the model, found by their vectors alone: a table of
    # tools/learn_word_vectors.py --fold-in, or a .npy file with the words beside it in a .txt file.
    keys.TEST.MASKX.UNSEEN_WORDS = ""
    # True: maps of these words are blended with those of the nearest concept with boxes. False:
    # they are found by Eq. 1 alone, as in the paper. Evaluation measures both.
    keys.TEST.MASKX.BLEND_UNSEEN = False
    # Those of ATTENTION_SIZES whose maps are shown and measured; (): all.
    keys.TEST.MASKX.SCORED_SIZES = default_of(EmbeddingModel, "scored_sizes")
    # Which attention maps of ConceptMask are shown, measured and segmented: "blended" (refined, and
    # blended where a concept has no boxes), "own" (not blended), "nearest" (those of the nearest
    # concept with boxes) or "initial" (of Eq. 1: after stage 2 the paper's "finetuned").
    keys.TEST.MASKX.ATTENTION_KIND = default_of(EmbeddingModel, "attention_kind")
    return keys


def _arguments_of(function: Callable) -> CN:
    """Make keys of the arguments that have a default."""
    arguments = inspect.signature(function).parameters.values()
    return CN({a.name.upper(): a.default for a in arguments if a.default is not a.empty})


def _add_missing(node: CN, defaults: CN) -> None:
    for key, value in defaults.items():
        if key not in node:
            node[key] = value
        elif isinstance(value, CN):
            _add_missing(node[key], value)


def read_config(file: str | os.PathLike[str], opts: Sequence[Any] = ()) -> CN:
    """Read a configuration file, and those it is based on, without running code from them.

    Args:
        opts: KEY VALUE pairs over the file, as on a command line.
    """
    file = os.fspath(file)
    if not PathManager.isfile(file):
        raise FileNotFoundError(f"--config-file '{file}': there is no such config file.")
    cfg = get_cfg()
    _check_content(read_plain(file), cfg, file)
    try:
        cfg.merge_from_file(file, allow_unsafe=False)
        cfg.merge_from_list(list(opts))
    except (AssertionError, KeyError, ValueError) as error:
        pairs = f" with KEY VALUE pairs {list(opts)}" if opts else ""
        raise ValueError(
            f"{error.args[0]}: {file}{pairs}. Correct the key or its value."
        ) from error
    return cfg


class _PlainConfig(CN):
    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:  # Detectron2's hook
        with super()._open_cfg(filename) as file:
            text = file.read()
        parse_yaml(text)  # what Detectron2 parses then repeats no key
        return io.StringIO(text)


def read_plain(file: str) -> Any:
    """Read a configuration and those it is based on, without running code from them."""
    where = f"Configuration '{file}', or one that it is based on,"
    try:
        return _PlainConfig.load_yaml_with_base(file, allow_unsafe=False)
    except yaml.YAMLError as error:
        cause = " ".join(str(error).split())
        raise ValueError(
            f"{where} is not plain YAML: {cause}. "
            "Allowed: keys and plain values; tags such as !!python are never run."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not text in UTF-8: {error}. Write it again.") from error
    except RecursionError as error:
        raise ValueError(
            f"{where} is nested too deep, or is based on itself. Correct its _BASE_."
        ) from error
    except OSError as error:
        raise ValueError(
            f"{where} cannot be read: '{error.filename}': {error.strerror}. Correct _BASE_."
        ) from error
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{where} holds no keys, or _BASE_ is no path. Allowed: KEY: VALUE in each line, and "
            "for _BASE_ a path or a list of paths."
        ) from error


def _check_content(content: Any, cfg: CN, file: str) -> None:
    """Refuse what Detectron2's reader does not expect."""
    if not isinstance(content, dict):
        raise ValueError(f"Configuration '{file}' holds {content!r:.80}. Allowed: keys and values.")
    for key, value in content.items():
        if isinstance(cfg.get(key), CN) and not isinstance(value, dict):
            raise ValueError(f"{file}: {key} is {value!r:.80}. Allowed: keys below it.")
    if not isinstance(content.get("VERSION", cfg.VERSION), int):
        raise ValueError(f"{file}: VERSION is {content['VERSION']!r:.80}. Allowed: {cfg.VERSION}.")
    left, count = [content], 0
    while left:  # anchors of YAML can make of a few lines more values than fit into memory
        value = left.pop()
        count += 1
        if count > _MAX_VALUES:
            raise ValueError(f"{file} holds more than {_MAX_VALUES} values. Remove its anchors.")
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise ValueError(f"{file} has keys {list(value)!r:.80}. Allowed: names.")
            left += value.values()
        elif isinstance(value, list):
            left += value
