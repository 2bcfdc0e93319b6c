r"""Measure what the steps of a system cost in time and memory.

All rows of a table are measured in one run, interleaved, so that only ratios need to be compared:
to the first row, the alternative, and to the floor, what the operations or the bytes of the step
take at the rates of this machine. Peak memory is that of what a step makes. With --json the rows
are compared with those of the last run in that file, as far as the noise allows.

Examples:
    python tools/benchmark.py mask_head --json mask_head.json
    python tools/benchmark.py mask_head --section predictor mlp --rois 32
    python tools/benchmark.py class_patterns --depth 34
    OMP_NUM_THREADS=1 python tools/benchmark.py large_vocabulary --section inference
    python tools/benchmark.py concept_mask --section attention
    python tools/benchmark.py word_vectors --images 100000 --words 5000
    python tools/benchmark.py features --backbone efficientnet_lite0
    python tools/benchmark.py gpu --json gpu.json
    python tools/benchmark.py photograph --megapixels 16 41
    python tools/benchmark.py data --images 5000 --json data.json
    python tools/benchmark.py long_run tools/quickstart.py --iterations 2000
    python tools/benchmark.py long_run tools/benchmarks/tiny_detectron2.py maskx output/tiny
    python tools/benchmark.py kill_trials tools/quickstart.py --resume --output {folder}
    python tools/benchmark.py kill_trials tools/benchmarks/tiny_detectron2.py maskx {folder} \
        --iterations 12 --period 3
"""

import argparse
import importlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from maskx.core.command_line import ended_in_one_line

if TYPE_CHECKING:  # a help text waits for none of these
    import torch
    from benchmarks.measure import Case

CONFIG = Path(__file__).parents[1] / "configs" / "MaskX" / "Base-MaskX-RCNN-FPN.yaml"
MASK_HEAD_SECTIONS = ("predictor", "head", "mlp", "trunk", "model")
LARGE_VOCABULARY_SECTIONS = ("inference", "training")
CONCEPT_MASK_SECTIONS = ("training", "attention", "prediction")
DATA_SECTIONS = ("reading", "average_precision", "mean_iou")


def mask_head_tables(
    arguments: argparse.Namespace, device: "torch.device"
) -> "Iterator[tuple[str, Callable[[], list[Case]]]]":
    """Yield the title of each table and what makes its cases, which take memory."""
    from benchmarks.mask_head import head_cases, mlp_cases, predictor_cases, trunk_cases

    sections = arguments.section or MASK_HEAD_SECTIONS
    rois, classes = {"num_rois": arguments.rois, "device": device}, arguments.classes
    if "predictor" in sections:
        for backward in (False, True):
            passes = "forward and backward" if backward else "forward"
            title = f"predictor alone, {passes}, {arguments.rois} RoIs"
            yield title, lambda b=backward: predictor_cases(**rois, classes=classes, backward=b)
    step = f"training step, {arguments.rois} RoIs"
    if "head" in sections:
        yield f"whole head, {step}", lambda: head_cases(**rois, classes=classes)
    if "mlp" in sections:
        yield f"MLP branch, {step}", lambda: mlp_cases(**rois, num_classes=classes[0])
    if "trunk" in sections:
        yield f"trunk, {step}", lambda: trunk_cases(**rois, num_classes=classes[0])
    if "model" in sections:
        if not arguments.section and importlib.util.find_spec("detectron2") is None:
            print("The section 'model' is left out: it needs Detectron2.\n")
            return
        import maskx.detectron2  # noqa: F401 - says what is missing

        # isort: split
        from benchmarks.whole_model import benchmark_cfg, model_cases

        size = arguments.image_size
        for num_classes in arguments.model_classes:
            cfg = benchmark_cfg(CONFIG, num_classes=num_classes, device=device)
            title = f"whole model, training step, K = {num_classes}, one image of {size} pixels"
            yield title, lambda c=cfg: model_cases(c, image_size=size)


def gpu_tables(
    arguments: argparse.Namespace, device: "torch.device"
) -> "Iterator[tuple[str, Callable[[], list[Case]]]]":
    """Yield the title of each table and what makes its cases, beside Detectron2's."""
    import maskx.detectron2  # noqa: F401 - says what is missing

    # isort: split
    from benchmarks.mask_head import predictor_cases
    from benchmarks.whole_model import benchmark_cfg, model_cases

    amp, words = device.type == "cuda", "AMP"
    if not amp:
        words = "float32 on a CPU"
        print("There is no GPU: this shows no more than that the script runs.\n")
    rois = {"num_rois": arguments.rois, "device": device, "classes": arguments.classes}
    for backward in (False, True):
        passes = "forward and backward" if backward else "forward"
        title = f"predictor alone, {passes}, {arguments.rois} RoIs, float32"
        yield title, lambda b=backward: list(predictor_cases(**rois, backward=b))
    for num_classes in arguments.classes[:2]:
        cfg = benchmark_cfg(CONFIG, num_classes=num_classes, device=device)
        for training in (True, False):
            task = "training step" if training else "inference"
            title = f"whole model, {task}, K = {num_classes}, {words}"
            sizes = {"image_size": arguments.image_size, "training": training, "amp": amp}
            yield title, lambda c=cfg, s=sizes: model_cases(c, **s)


def class_patterns_tables(
    arguments: argparse.Namespace, device: "torch.device"
) -> "Iterator[tuple[str, Callable[[], Iterator[Case]]]]":
    """Yield the title of the table and what makes its cases."""
    from benchmarks.class_patterns import discovery_cases

    depth, size, images = arguments.depth, arguments.image_size, arguments.images
    sizes = {"depth": depth, "image_size": size, "num_images": images}
    title = f"moments of all blocks of C4, ResNet-{depth}, {images} images of {size} pixels"
    yield title, lambda: discovery_cases(**sizes, device=device)


def large_vocabulary_tables(
    arguments: argparse.Namespace, device: "torch.device"
) -> "Iterator[tuple[str, Callable[[], Iterator[Case]]]]":
    """Yield the title of each table and what makes its cases, which take memory."""
    from benchmarks.large_vocabulary import inference_cases, training_cases

    sections = arguments.section or LARGE_VOCABULARY_SECTIONS
    classes, size, images = arguments.classes, arguments.image_size, arguments.images
    sizes = {"num_classes": classes, "channels": arguments.channels, "image_size": size}
    if "inference" in sections:
        title = f"label map of {size} x {size} pixels, K = {classes}"
        yield title, lambda: inference_cases(**sizes, device=device)
    if "training" in sections:
        title = f"training step without a backbone, {images} images of {size} pixels, K = {classes}"
        yield title, lambda: training_cases(**sizes, num_images=images, device=device)


def concept_mask_tables(
    arguments: argparse.Namespace, device: "torch.device"
) -> "Iterator[tuple[str, Callable[[], Iterator[Case]]]]":
    """Yield the title of each table and what makes its cases, which take memory."""
    from benchmarks import concept_mask as concept_benchmark

    sections = arguments.section or CONCEPT_MASK_SECTIONS
    size, concepts = arguments.image_size, arguments.concepts
    options = {"vocabularies": arguments.vocabularies, "image_size": size, "device": device}
    if "training" in sections:
        images = arguments.images
        title = f"stage 2, training step without a backbone, {images} images of {size} pixels"
        yield title, lambda: concept_benchmark.training_cases(**options, num_images=images)
    options["num_concepts"] = concepts
    if "attention" in sections:
        title = f"attention maps of {concepts} concepts in an embedded image of {size} pixels"
        yield title, lambda: concept_benchmark.attention_cases(**options)
    if "prediction" in sections:
        depth = arguments.depth
        title = f"masks of {concepts} concepts in an image of {size} pixels, ResNet-{depth}"
        yield title, lambda: concept_benchmark.prediction_cases(**options, depth=depth)


def data_tables(
    arguments: argparse.Namespace, device: "torch.device"
) -> "Iterator[tuple[str, Callable[[], Iterator[Case]]]]":
    """Yield the title of each table and what makes its cases; all run on the CPU."""
    from benchmarks import data as data_benchmark

    sections, images = arguments.section or DATA_SECTIONS, arguments.images
    if "reading" in sections:
        title = f"annotations of {images} images with 7 objects each, read"
        yield title, lambda: data_benchmark.reading_cases(images)
    if "average_precision" in sections:
        title = f"COCO AP of masks in {images} images"
        yield title, lambda: data_benchmark.average_precision_cases(images)
    if "mean_iou" in sections:
        for num_classes in arguments.classes:
            title = f"mean IoU of one label map of 512 x 683 pixels, K = {num_classes}"
            yield title, lambda k=num_classes: data_benchmark.mean_iou_cases(k)


def features_tables(
    arguments: argparse.Namespace, device: "torch.device"
) -> "Iterator[tuple[str, Callable[[], Iterator[Case]]]]":
    """Yield the title of each table and what makes its cases."""
    from benchmarks import frozen_features

    names = ("backbone", "image_size")
    options = {name: getattr(arguments, name) for name in names} | {"num_images": arguments.images}
    words = f"{arguments.backbone}, training step of {arguments.images} images of "
    words += f"{arguments.image_size} pixels"
    with tempfile.TemporaryDirectory() as folder:
        options |= {"folder": Path(folder), "device": device}
        yield f"light detector, {words}", lambda: frozen_features.detector_cases(**options)
        yield f"classifier, {words}", lambda: frozen_features.classifier_cases(**options)


def positive(text: str) -> int:
    """Read a number of something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    systems = parser.add_subparsers(dest="system", required=True)
    mask_head = systems.add_parser("mask_head", help="the mask head of Mask^X R-CNN")
    mask_head.set_defaults(tables=mask_head_tables)
    gpu = systems.add_parser("gpu", help="Mask^X R-CNN beside Detectron2's Mask R-CNN on a GPU")
    gpu.set_defaults(tables=gpu_tables)
    class_patterns = systems.add_parser("class_patterns", help="the pass that finds patterns")
    class_patterns.set_defaults(tables=class_patterns_tables)
    large_vocabulary = systems.add_parser("large_vocabulary", help="LarvSeg with all its classes")
    large_vocabulary.set_defaults(tables=large_vocabulary_tables)
    concept_mask = systems.add_parser("concept_mask", help="ConceptMask with all its concepts")
    concept_mask.set_defaults(tables=concept_mask_tables)
    data = systems.add_parser("data", help="annotations read, COCO AP, mean IoU")
    data.set_defaults(tables=data_tables)
    features = systems.add_parser("features", help="steps with features of a frozen backbone kept")
    features.set_defaults(tables=features_tables)
    word_vectors = systems.add_parser("word_vectors", help="word vectors from generated tags, once")
    photograph = systems.add_parser("photograph", help="memory of Mask^X R-CNN, by megapixels")
    long_run = systems.add_parser("long_run", help="whether memory and files of a tool stay flat")
    long_run.set_defaults(run=run_long)
    add = long_run.add_argument
    add("--warm-up", type=positive, default=200, help="steps after which memory must be flat")
    add("command", nargs=argparse.REMAINDER, help="a Python tool, and all of its arguments")
    kills = systems.add_parser("kill_trials", help="whether a killed tool ends with the same bits")
    kills.set_defaults(run=run_kill_trials)
    add = kills.add_argument
    add("--trials", type=positive, default=8)
    add("--seed", type=int, default=0, help="of the moments")
    add("--folder", type=Path, help="of the trials (default: one that is removed)")
    add("command", nargs=argparse.REMAINDER, help="a Python tool, and all of its arguments")
    number = {"type": positive}
    in_process = (mask_head, gpu, class_patterns, large_vocabulary, concept_mask, data, features)
    for system in (*in_process, word_vectors, photograph, long_run):
        add = system.add_argument
        add("--json", type=Path, metavar="FILE", help="write all rows; compare with those there")
        add("--compare", type=Path, metavar="FILE", help="of an earlier run (default: --json)")
    for system in in_process:
        system.set_defaults(run=run)
        add = system.add_argument
        add("--repeats", **number, default=5, help="rounds after one that warms up")
        add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add = class_patterns.add_argument
    add("--depth", type=int, choices=(18, 34, 50, 101), default=18, help="of the ResNet")
    add("--images", **number, default=2, help="per step")
    add("--image-size", **number, default=328, help="pixels")
    add = large_vocabulary.add_argument
    add("--section", nargs="+", choices=LARGE_VOCABULARY_SECTIONS, help="default: all")
    add("--classes", **number, default=21841, help="of the vocabulary")
    add("--channels", **number, default=768, help="of the features")
    add("--images", **number, default=2, help="per training step")
    add("--image-size", **number, default=512, help="pixels")
    add = concept_mask.add_argument
    add("--section", nargs="+", choices=CONCEPT_MASK_SECTIONS, help="default: all")
    add("--vocabularies", **number, nargs="+", default=[1000, 18000], help="numbers of concepts")
    add("--concepts", **number, default=5, help="that are asked for")
    add("--depth", type=int, choices=(18, 34, 50, 101), default=50, help="of both ResNets")
    add("--images", **number, default=2, help="per training step")
    add("--image-size", **number, default=320, help="pixels")
    add = features.add_argument
    add("--backbone", default="efficientnet_lite0", help="model of timm")
    add("--images", **number, default=4, help="per training step")
    add("--image-size", **number, default=256, help="pixels")
    add = mask_head.add_argument
    add("--section", nargs="+", choices=MASK_HEAD_SECTIONS, help="default: all")
    add("--rois", **number, default=100, help="RoIs, but for the whole model")
    classes_help = "of predictor and head; K-channel only where its logits fit in 1 GiB"
    add("--classes", **number, nargs="+", default=[80, 3000, 21841], help=classes_help)
    add("--model-classes", **number, nargs="+", default=[80, 1203], help="of the whole model")
    add("--image-size", **number, default=320, help="pixels, for the whole model")
    add = gpu.add_argument
    add("--rois", **number, default=100, help="of the predictor alone")
    add("--classes", **number, nargs="+", default=[80, 1203, 21841], help="models: the first two")
    add("--image-size", **number, default=800, help="pixels")
    add = data.add_argument
    add("--section", nargs="+", choices=DATA_SECTIONS, help="default: all")
    add("--images", **number, default=2000, help="of the annotation file; COCO's has 118,287")
    add("--classes", **number, nargs="+", default=[80, 300, 600, 1000, 21841], help="of mean IoU")
    word_vectors.set_defaults(run=run_word_vectors)
    add = word_vectors.add_argument
    add("--images", **number, default=1_000_000)
    add("--words", **number, default=18_000, help="of the vocabulary")
    add("--tags", **number, default=30, help="per image")
    add("--topics", **number, default=300, help="that tags of an image are of")
    add("--dim", **number, default=512, help="of the vectors")
    photograph.set_defaults(run=run_photograph)
    add = photograph.add_argument
    add("--megapixels", type=float, nargs="+", default=[16, 41])
    add("--objects", **number, default=24, help="with masks")
    add("--image-size", **number, default=128, help="pixels, in training and prediction")
    return parser.parse_args()


def stored_rows(arguments: argparse.Namespace) -> list[dict]:
    """Return the rows of the last run: of --compare, or of the file that --json writes."""
    path = arguments.compare or arguments.json
    if path is None or not (arguments.compare or path.is_file()):
        return []
    return json.loads(path.read_text("utf-8"))["rows"]


def say_changes(found: list[dict], stored: list[dict]) -> None:
    """Print what changed since the last run."""
    from benchmarks.measure import changes

    if compared := changes(found, stored):
        print("since the last stored run:", *compared, sep="\n  ", end="\n\n", flush=True)


def write(arguments: argparse.Namespace, rows: list[dict], **content: object) -> None:
    """Write all rows, if asked for."""
    from maskx.core.files import write_json

    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, {**content, "rows": rows})


def run_long(arguments: argparse.Namespace) -> None:
    """Run a tool, and say how memory and open files of each of its trainings grew."""
    import torch
    from benchmarks.long_runs import watch
    from benchmarks.measure import describe_machine, format_memory_rows, memory_row

    rows, table = [], " ".join(arguments.command)
    for number, run in enumerate(watch(arguments.command, warm_up=arguments.warm_up), 1):
        files = run.end_files - run.start_files
        name = f"training {number}, {run.steps} steps, {run.end_files} open files, {files} more"
        start = {"alternative": run.start_bytes, "floor": run.start_bytes}
        rows.append(memory_row(table, name, run.end_bytes, **start, open_files=run.end_files))
    print(f"{format_memory_rows(rows)}\n")
    say_changes(rows, stored_rows(arguments))
    write(arguments, rows, machine=describe_machine(torch.device("cpu")))


def run_kill_trials(arguments: argparse.Namespace) -> None:
    """Kill a tool at random moments, and say whether it ended as if it had not been killed."""
    from benchmarks.kill_trials import kill_trials

    for module in ("detectron2", "torchvision"):  # so that each start takes little time
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(f"maskx.{module}")
    found = []
    print("trial  kills  in a write  seconds  checkpoints", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder, options = arguments.folder or Path(scratch), {"seed": arguments.seed}
        for trial in kill_trials(arguments.command, folder, count=arguments.trials, **options):
            found.append(trial)
            end = trial.failure or ", ".join(trial.differences) or "equal"
            numbers = f"{len(found):5}  {trial.kills:5}  {trial.in_writes:10}"
            print(f"{numbers}  {trial.seconds:7.0f}  {end}", flush=True)
    equal, kills, in_writes = (
        sum(getattr(trial, name) for trial in found) for name in ("is_equal", "kills", "in_writes")
    )
    print(
        f"\n{equal} of {len(found)} trials ended with the same bits, after {kills} kills, "
        f"{in_writes} of them in a write."
    )


def run_photograph(arguments: argparse.Namespace) -> None:
    """Measure processes of their own, on every host that is installed."""
    import torch
    from benchmarks.measure import describe_machine, format_memory_rows
    from benchmarks.photographs import photograph_rows

    hosts = ("pip", "detectron2") if importlib.util.find_spec("detectron2") else ("pip",)
    machine = describe_machine(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in machine.items()), end="\n\n")
    sizes = {"objects": arguments.objects, "image_size": arguments.image_size}
    rows, stored = [], stored_rows(arguments)
    for megapixels in arguments.megapixels:
        found = photograph_rows(megapixels=megapixels, hosts=hosts, **sizes)
        print(f"{found[0]['table']}\n{format_memory_rows(found)}\n", flush=True)
        say_changes(found, stored)
        rows += found
    write(arguments, rows, machine=machine)


def run_word_vectors(arguments: argparse.Namespace) -> None:
    """Learn word vectors once: minutes, so nothing is repeated."""
    import torch
    from benchmarks.measure import describe_machine, measure_rates
    from benchmarks.tag_vectors import measure_arpack, measure_learning, write_generated_tags

    machine, rates = describe_machine(torch.device("cpu")), measure_rates(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in machine.items()), end="\n\n")
    sizes = {"num_images": arguments.images, "num_words": arguments.words}
    sizes |= {"tags_per_image": arguments.tags, "num_topics": arguments.topics}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tags.jsonl"
        write_generated_tags(path, **sizes, seed=0)
        cost = measure_learning(path, dim=arguments.dim)
        alternative, operations = measure_arpack(path, dim=arguments.dim)
        floor = rates.floor(operations, path.stat().st_size)
    print(
        f"reading the tag list {cost.read_seconds:.1f} s, learning {cost.learn_seconds:.1f} s, "
        f"both {cost.cpu_seconds:.1f} CPU s, peak memory {cost.peak_bytes / 1e9:.2f} GB; "
        f"alternative (ARPACK) {alternative:.1f} CPU s, floor {floor:.1f} s\n"
    )
    settings = {**sizes, "dim": arguments.dim}
    ratios = {"ratio": cost.cpu_seconds / alternative, "over_floor": cost.cpu_seconds / floor}
    row = {"table": f"word vectors {settings}", "name": "learn_word_vectors", **ratios}
    row |= {"alternative_seconds": alternative, "floor_seconds": floor, "spread": 0.05}
    say_changes([row], stored_rows(arguments))
    write(arguments, [row], machine=machine, settings=settings, **cost._asdict())


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write the tables of a system."""
    import torch
    from benchmarks.measure import describe_machine, format_rows, measure_rates, measure_table

    name, has_gpu = arguments.device, torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ValueError("--device cuda: PyTorch finds no GPU here. Allowed: auto, cpu.")
    device = torch.device(name if name != "auto" else "cuda" if has_gpu else "cpu")
    stored = stored_rows(arguments)
    machine, rates = describe_machine(device), measure_rates(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(
        f"rates of this run: {rates.bytes_per_second / 1e9:.1f} GB/s copied, "
        f"{rates.operations_per_second / 1e9:.0f} GFLOP/s of matrix products\n"
    )
    rows = []
    for title, make_cases in arguments.tables(arguments, device):
        found = measure_table(
            title, list(make_cases()), rounds=arguments.repeats, device=device, rates=rates
        )
        print(f"{title}\n{format_rows(found)}\n", flush=True)
        say_changes(found, stored)
        rows += found
        write(arguments, rows, machine=machine, rates=rates._asdict(), repeats=arguments.repeats)


def main() -> None:
    """Run; user errors end with their message instead of a traceback."""
    with ended_in_one_line():
        arguments = parse_arguments()
        arguments.run(arguments)


if __name__ == "__main__":
    main()
