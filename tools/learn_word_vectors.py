r"""Make a table of word vectors: learn it from the tags of images, or convert published vectors.

The table is one file, which the networks of ConceptMask are trained and queried with. New words can
be folded into a table that was learned from tags; their vectors are then given in queries.

Examples:
    python tools/learn_word_vectors.py --tags tags.jsonl --min-count 10 --output words.safetensors
    python tools/learn_word_vectors.py --tags annotations.json --vocabulary words.txt --dim 256 \
        --output words.safetensors
    python tools/learn_word_vectors.py --vectors glove.6B.300d.txt --vocabulary words.txt \
        --tags tags.jsonl --output words.safetensors
    python tools/learn_word_vectors.py --table words.safetensors --tags more_tags.jsonl \
        --fold-in unicorn "fire truck" --output new_words.safetensors
"""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from maskx.core.command_line import ended_in_one_line

if TYPE_CHECKING:  # a help text waits for none of these
    from maskx.core.word_table import WordTable
    from maskx.data.tag_lists import TagList


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tags", type=Path, help="tags of images, JSON lines or a COCO file")
    add("--vocabulary", type=Path, help="words by concept index: text, or a JSON list (.json)")
    add(
        "--vectors",
        type=Path,
        help="convert these: GloVe, word2vec, fastText text, .npy; or minilm, glove (extra text)",
    )
    add("--table", type=Path, help="table to fold words into")
    add("--fold-in", nargs="+", metavar="WORD", help="new words, for --table")
    add("--output", type=Path, required=True, help="table to write; of the new words, --fold-in")
    add("--min-count", type=int, default=1, help="leave tags on fewer images out")
    add("--dim", type=int, default=512, help="most components (default: %(default)s)")
    add("--smoothing", type=float, default=1.0, help="images towards chance (default: %(default)s)")
    add("--plain-pmi", action="store_true", help="keep negative entries of the PMI matrix")
    add("--skip-bad", action="store_true", help="leave unknown and repeated tags out, counted")
    arguments = parser.parse_args()
    if arguments.output.is_dir():
        parser.error("--output is a folder; give a file")
    if (arguments.table is None) != (arguments.fold_in is None):
        parser.error("--table and --fold-in belong together")
    if arguments.vectors and not arguments.vocabulary:
        parser.error("--vectors needs --vocabulary: the words to take from it")
    if arguments.table and (arguments.vectors or arguments.vocabulary):
        parser.error("--table has its words; --vectors and --vocabulary do not go with it")
    learning = ("dim", "smoothing", "plain_pmi")
    if (arguments.vectors or arguments.table) and any(
        getattr(arguments, name) != parser.get_default(name) for name in learning
    ):
        parser.error("--dim, --smoothing and --plain-pmi are for learning a table from tags only")
    if not arguments.tags and not arguments.vectors:
        parser.error("give --tags, or --vectors to convert")
    if arguments.output.suffix in (".npy", ".txt"):
        parser.error("--output is one file with words and vectors; end it with .safetensors")
    return arguments


def make_table(arguments: argparse.Namespace) -> "WordTable":
    """Learn or convert."""
    from maskx.core.word_table import word_table_from_file
    from maskx.data.tag_lists import read_vocabulary
    from maskx.systems.concept_mask.tag_vectors import learn_word_vectors

    words = read_vocabulary(arguments.vocabulary) if arguments.vocabulary else None
    tags = read_tags(arguments, words) if arguments.tags else None
    if arguments.vectors:
        counted = {"counts": tags.counts(), "num_images": tags.num_tagged} if tags else {}
        return word_table_from_file(arguments.vectors, words, **counted)
    return learn_word_vectors(
        tags,
        dim=arguments.dim,
        positive=not arguments.plain_pmi,
        smoothing=arguments.smoothing,
    )


def read_tags(arguments: argparse.Namespace, words: tuple[str, ...] | None) -> "TagList":
    """Read the tag list as the options say."""
    from maskx.data.tag_lists import read_tag_list

    return read_tag_list(
        arguments.tags,
        vocabulary=words,
        min_count=arguments.min_count,
        strict=not arguments.skip_bad,
    )


def fold_in(arguments: argparse.Namespace) -> None:
    """Write the table of new words, and say which have no vector."""
    from maskx.core.word_table import load_word_table, save_word_table
    from maskx.systems.concept_mask.tag_vectors import fold_in_words

    tags = read_tags(arguments, None)
    table, left_out = fold_in_words(load_word_table(arguments.table), tags, arguments.fold_in)
    save_word_table(arguments.output, table)
    print(f"Wrote {arguments.output}: {len(table)} new words, vectors of length {table.dim}")
    for word, reason in left_out.items():
        print(f"Without a vector: '{word}': {reason}")


def main() -> None:
    """Write the table; user errors end with their message instead of a traceback."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with ended_in_one_line():
        from maskx.core.word_table import save_word_table
        from maskx.systems.concept_mask.tag_vectors import format_spectrum

        if arguments.fold_in:
            fold_in(arguments)
            return
        table = make_table(arguments)
        save_word_table(arguments.output, table)
    print(format_spectrum(table))
    print(f"Wrote {arguments.output}: {len(table)} words, vectors of length {table.dim}")


if __name__ == "__main__":
    main()
